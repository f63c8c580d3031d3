"""Files that are seen whole or not at all, and the modes of files that libraries make private."""

from __future__ import annotations

import os
import stat
import tempfile
import uuid
from pathlib import Path


def usual_mode(folder: Path) -> int:
    """Return the mode that a new file in a folder gets, by the umask; safetensors' 0600 would hide it from its sharers.

    Taken from a file that is made and removed: to read the umask is to change it, for all threads.
    """
    probe = folder / f".mode-{uuid.uuid4().hex}"
    try:
        with open(probe, "xb") as file:
            return stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    finally:
        probe.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, and its folder where it is missing; whoever looks sees it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.part-", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.chmod(part, usual_mode(path.parent))  # mkstemp's 0600 is private
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
