"""Training stands still while something is timed: a lock that the benchmarks hold and training waits for."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def lock_file() -> Path:
    """Return the file that the lock is on: of this user and machine; ``REFRAG_PAUSE_LOCK`` names another."""
    return Path(os.environ.get("REFRAG_PAUSE_LOCK") or Path(tempfile.gettempdir()) / f"refrag-pause-{os.getuid()}.lock")


@contextlib.contextmanager
def training_paused() -> Iterator[None]:
    """Hold this user's training runs on this machine until the block ends, or the process.

    A run stops before its next step, which may be seconds later. Blocks of several processes take turns.

    Examples
    --------
    >>> with training_paused():
    ...     pass  # time something
    """
    with open(lock_file(), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def wait_while_paused() -> None:
    """Return at once, or as soon as no process is within ``training_paused``."""
    with open(lock_file(), "a") as file:
        # Let go of at once: training never keeps a benchmark waiting.
        fcntl.flock(file, fcntl.LOCK_SH)
