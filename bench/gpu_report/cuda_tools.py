"""Find programs of the CUDA toolkit, which are usually not on PATH."""

from __future__ import annotations

import shutil
from pathlib import Path

_FOLDERS = (
    "/usr/local/cuda/bin",
    "/usr/local/cuda-*/bin",
    "/opt/nvidia/nsight-compute/*",
    "/usr/local/cuda*/compute-sanitizer",
)


def find(name: str) -> str | None:
    """Return the path of a program such as ``ncu``, or None if it is not installed."""
    if found := shutil.which(name):
        return found
    paths = [path for folder in _FOLDERS for path in sorted(Path("/").glob(f"{folder[1:]}/{name}"), reverse=True)]
    return str(paths[0]) if paths else None
