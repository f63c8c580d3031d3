"""Run a process and end it when it stops writing, so that a hang on a GPU costs seconds and is reported as such."""

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
    """Raised if the process wrote nothing within its time."""


def lines(
    command: Sequence[str], *, start: float, patience: float, deadline: float = float("inf")
) -> Iterator[dict[str, Any]]:
    """Yield the JSON lines that a process writes, and ignore its other output.

    Parameters
    ----------
    command : sequence of str
    start, patience : float
        Maximum seconds until the first line, and between lines.
    deadline : float
        ``time.monotonic()`` at which the process is ended in any case.

    Raises
    ------
    Silent
        If it wrote nothing for that long. The process and its children have been ended.
    RuntimeError
        If the process failed.
    """
    # In its own session, so that its children end with it.
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
