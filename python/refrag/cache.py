"""The cache folder. Each entry is built once and visible to other processes only when it is complete."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from refrag.file_modes import usual_mode


class CacheError(RuntimeError):
    """Raised if the cache folder can't be used; the message names it."""


def cache_folder() -> Path:
    """Return the cache folder: ``REFRAG_CACHE``, or ``~/.cache/refrag-kernels``."""
    chosen = os.environ.get("REFRAG_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "refrag-kernels"


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """Return the cache entry ``name``, building it first if it doesn't exist.

    ``build`` fills a temporary folder, which is renamed once it is complete, so an interrupted run leaves no partial
    entry. If two processes need the same entry, one builds it while the other waits.

    Parameters
    ----------
    name : str
        Name of the entry. Include a version: a finished entry is never rebuilt.
    build : callable
        Called with an empty folder.

    Raises
    ------
    CacheError
        If the cache folder can't be written.
    """
    entry = cache_folder() / name
    if entry.exists():
        return entry
    with _naming_folder(entry.parent):
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock = open(entry.parent / f".{name}.lock", "w")
    with lock:
        # The operating system releases the lock when its process dies, so a killed run doesn't block others.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if entry.exists():
            return entry
        for left_over in entry.parent.glob(f".{name}.part-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        with _naming_folder(entry.parent):
            part = entry.parent / f".{name}.part-{uuid.uuid4().hex}"
            part.mkdir()
            try:
                build(part)
                mode = usual_mode(part)
                for path in part.rglob("*"):
                    if path.is_file() and not path.is_symlink():
                        path.chmod(mode)
                os.replace(part, entry)
            except BaseException:
                shutil.rmtree(part, ignore_errors=True)
                raise
    return entry


@contextlib.contextmanager
def _naming_folder(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"cache folder {folder}: can't be written ({error.strerror or error}); "
            "set REFRAG_CACHE to a writable folder with about 600 MB free"
        ) from error
