"""Atomic writes, and the usual permissions for files that libraries create with mode 0600."""

from __future__ import annotations

import os
import stat
import tempfile
import uuid
from pathlib import Path


def usual_mode(folder: Path) -> int:
    """Return the mode that the umask gives a new file in a folder, instead of the 0600 that safetensors sets.

    Creates and removes a file to find out, since reading the umask means changing it for all threads.
    """
    probe = folder / f".mode-{uuid.uuid4().hex}"
    try:
        with open(probe, "xb") as file:
            return stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    finally:
        probe.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically, creating its folder if it is missing."""
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
