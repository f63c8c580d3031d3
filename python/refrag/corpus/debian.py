"""Downloads Debian packages by name and unpacks them into a folder, without root, as sources of text."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

# Manuals of many kinds, all from Debian's section "main", which has only free licences.
DOCUMENTATION = (
    "apache2-doc", "autoconf-doc", "bash-doc", "bind9-doc", "cmake-doc", "debian-faq", "debian-policy",
    "debian-reference-en", "developers-reference", "erlang-doc", "exim4-doc-html", "fp-docs-3.2.2", "freebsd-manpages",
    "ghostscript-doc", "gimp-help-en", "gnuplot-doc", "harden-doc", "installation-guide-amd64", "libboost1.74-doc",
    "libreoffice-help-en-us", "lilypond-doc-html", "linux-doc-6.1", "llvm-15-doc", "maint-guide", "manpages",
    "manpages-dev", "maxima-doc", "nmap", "octave-doc", "openjdk-17-doc", "python-django-doc", "python-scipy-doc",
    "python-sqlalchemy-doc", "python3.11-doc", "qtbase5-doc-html", "r-doc-html", "rust-doc", "sbcl-doc", "sphinx-doc",
    "sqlite3-doc", "vim-doc", "zsh-doc",
)  # fmt: skip

# Domains for evaluation, which must never be trained on.
HELD_OUT = {
    "handbook": ("debian-handbook",),
    "postgres": ("postgresql-doc-15",),
    "perl": ("perl-doc",),
    "git": ("git-doc", "git-man"),
}
_HELD_OUT_NAME = re.compile(r"(debian-handbook|postgresql-doc(-\d+)?|perl-doc|git-doc|git-man)")


class PackageError(ValueError):
    """Raised if a package is not available or not usable; the message names it."""


@dataclasses.dataclass(frozen=True)
class Package:
    """A downloaded package.

    Attributes
    ----------
    name, version : str
    path : Path
        The .deb file.
    """

    name: str
    version: str
    path: Path

    def sha256(self) -> str:
        """Return the file's hash."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)

    @contextlib.contextmanager
    def unpacked(self) -> Iterator[Path]:
        """Unpack the package into a temporary folder.

        Raises
        ------
        PackageError
            If ``dpkg-deb`` is missing, or the file is not a package.
        """
        with tempfile.TemporaryDirectory(prefix=f"{self.name}-") as folder:
            _run(["dpkg-deb", "-x", str(self.path.resolve()), folder], self.name)
            yield Path(folder)


def refuse_held_out(names: Sequence[str]) -> None:
    """Refuse packages that are held out for evaluation.

    Raises
    ------
    PackageError
        If one of ``names`` is held out.
    """
    for name in names:
        if _HELD_OUT_NAME.fullmatch(name):
            raise PackageError(f"{name}: is held out for evaluation and must not be trained on")


def fetch(name: str, folder: Path) -> Package:
    """Return a package, running ``apt-get download`` unless ``folder`` already contains it.

    Raises
    ------
    PackageError
        If ``apt-get`` is missing, or has no such package.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", name):
        raise PackageError(f"{name}: is not the name of a package")
    folder.mkdir(parents=True, exist_ok=True)
    found = _downloaded(name, folder)
    if found is None:
        # Download into a temporary folder, so that an interrupted download isn't mistaken for a package.
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as part:
            _run(["apt-get", "download", "-q", name], name, cwd=part)
            for file in Path(part).glob("*.deb"):
                shutil.move(file, folder / file.name)
        found = _downloaded(name, folder)
    if found is None:
        raise PackageError(f"{name}: apt-get downloaded no such package")
    return found


def licences(package: Package, folder: Path) -> list[str]:
    """Return the short names of the licences that a package states in its ``copyright`` file.

    For a file in the machine-readable format (``License: GPL-2+``), these are its names in order, except that the main
    licence (``Files: *``) comes first. For a file in free form, these are "in free form" and the licences in
    ``/usr/share/common-licenses`` that it refers to. If the package's documentation folder is a link to that of another
    package, this downloads the other package.

    Parameters
    ----------
    package : Package
    folder : Path
        The unpacked package.

    Raises
    ------
    PackageError
        If there is no ``copyright`` file, so that the licence is unknown.
    """
    own = folder / "usr" / "share" / "doc" / package.name
    if own.is_symlink():
        other = fetch(own.readlink().parts[0], package.path.parent)
        if other.name != package.name:
            with other.unpacked() as unpacked:
                return licences(other, unpacked)
    file = own / "copyright"
    if not file.is_file():
        raise PackageError(f"{package.name}: has no copyright file, so that its licence is unknown")
    text = file.read_text(encoding="utf-8", errors="replace")
    if text.startswith("Format"):
        names = dict.fromkeys(name.strip() for name in re.findall(r"^License: *(\S.*)$", text, re.MULTILINE))
        main = re.search(r"^Files: *\*\s*\n(?:(?!\n).*\n)*?License: *(\S.*)$", text, re.MULTILINE)
        return sorted(names, key=lambda name: main is None or name != main[1].strip())
    common = set(re.findall(r"/usr/share/common-licenses/([A-Za-z]+(?:-\d+(?:\.\d+)?)?)", text))
    return ["in free form", *sorted(common)]


def _downloaded(name: str, folder: Path) -> Package | None:
    """Return the newest download of a package. Files are called NAME_VERSION_ARCHITECTURE.deb, with : as %3a."""
    files = sorted(folder.glob(f"{name}_*.deb"), key=lambda file: (file.stat().st_mtime_ns, file.name))
    if not files:
        return None
    return Package(name, files[-1].name.split("_")[1].replace("%3a", ":"), files[-1])


def _run(command: list[str], name: str, cwd: str | None = None) -> None:
    if shutil.which(command[0]) is None:
        raise PackageError(
            f"{name}: needs {command[0]}, which is not on PATH; it is part of Debian and its derivatives"
        )
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith(("E:", "dpkg-deb: error"))]
        reason = "; ".join(errors) or result.stderr.strip() or f"exit status {result.returncode}"
        raise PackageError(f"{name}: {' '.join(command[:2])} failed ({reason})")


def _digest(file) -> str:  # type: ignore[no-untyped-def]
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
