"""A small package archive with fakes of apt-get and dpkg-deb, so that tests need no network and no apt."""

import os
import tarfile
from io import BytesIO

_APT_GET = """#!/bin/sh
found=$(ls {archive}/"$3"_*.deb 2>/dev/null) || {{ echo "E: Unable to locate package $3" >&2; exit 100; }}
cp $found .
"""
_DPKG_DEB = """#!/bin/sh
exec tar -xf "$2" -C "$3"
"""
COPYRIGHT = """Format: https://example.org/copyright-format

Files: icons
License: Artistic

Files: *
Copyright: the authors
License: Expat
 free

License: GPL-2+
 free too
"""


def make_archive(folder, packages, monkeypatch):
    """Put fakes on PATH that serve an archive of packages, given as name -> {path: text or bytes}."""
    archive, programs = folder / "archive", folder / "programs"
    archive.mkdir()
    programs.mkdir()
    for name, files in packages.items():
        add_package(archive, name, files)
    for name, script in (("apt-get", _APT_GET), ("dpkg-deb", _DPKG_DEB)):
        (programs / name).write_text(script.format(archive=archive))
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return archive


def add_package(archive, name, files):
    with tarfile.open(archive / f"{name}_1%3a2.0-1_all.deb", "w") as tar:
        for path, content in {f"usr/share/doc/{name}/copyright": COPYRIGHT, **files}.items():
            if content is None:
                continue
            data = content if isinstance(content, bytes) else content.encode()
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            tar.addfile(entry, BytesIO(data))


def prose(subject, paragraphs=6):
    """Return an English document that is unique to the subject."""
    return "\n\n".join(
        f"The {subject} of chapter {'abcdefghij'[number]} is one of the parts that this manual is about, and it is not "
        f"the same as that of any other {subject} which can be found in the {subject} guide of the {subject} project."
        for number in range(paragraphs)
    )
