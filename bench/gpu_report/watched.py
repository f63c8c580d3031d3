"""A process that is ended when it falls silent: what hangs on a GPU costs seconds, and is told from what is wrong."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any


class Silent(Exception):
    """The process wrote nothing for as long as it was given."""


def lines(
    command: Sequence[str], *, start: float, patience: float, deadline: float = float("inf")
) -> Iterator[dict[str, Any]]:
    """Yield the lines of JSON that a process writes; what else it writes is left out.

    Parameters
    ----------
    command : sequence of str
    start, patience : float
        Seconds until the first line, and from one to the next.
    deadline : float
        ``time.monotonic()`` at which it is ended, whatever it writes.

    Raises
    ------
    Silent
        If it wrote nothing for so long. It has been ended, with all that it started.
    RuntimeError
        If it failed.
    """
    # A session of its own: its processes are ended together.
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    written: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            written.put(line)
        written.put(None)

    threading.Thread(target=read, daemon=True).start()
    wait = start
    try:
        while True:
            try:
                line = written.get(timeout=max(0.0, min(wait, deadline - time.monotonic())))
            except queue.Empty:
                raise Silent(f"nothing written for {wait:.0f} s, or out of time") from None
            if line is None:
                break
            wait = patience
            if line.startswith("{"):
                yield json.loads(line)
        if process.wait():
            raise RuntimeError(f"exit code {process.returncode}")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
