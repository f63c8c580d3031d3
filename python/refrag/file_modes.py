"""The modes of files that other libraries make private."""

from __future__ import annotations

import os
import stat
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
