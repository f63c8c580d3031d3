"""Run a block in a process of its own, which ends when its time is over; what it wrote until then stays."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.gpu_report.catalogue import Block

_GRACE = 3.0  # seconds from the request to end to the end by force
_START = 8.0  # seconds that a process takes to import torch and to end


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a block ended: "ok", "failed", "out of time" or "absent"."""

    name: str
    status: str
    seconds: float
    limit: float
    command: list[str]
    code: int | None = None
    reason: str = ""
    tail: str = ""


def command(block: Block, device: str, results: Path) -> list[str]:
    """Return what runs a block. Its own time is shorter than its limit, so that it can end by itself."""
    seconds = max(0.6 * block.seconds, block.seconds - _START)
    options = ("--device", device, "--seconds", f"{seconds:.1f}", "--results", str(results))
    return [sys.executable, "-m", block.module, *options]


def run(
    block: Block, words: Sequence[str], log: Path, root: Path, environment: Mapping[str, str] | None = None
) -> Outcome:
    """Run a command from ``root`` for at most ``block.seconds``; what it prints goes to ``log``."""
    if block.absent:
        return Outcome(block.name, "absent", 0.0, block.seconds, [])
    start, late, problem = time.monotonic(), False, ""
    process: subprocess.Popen | None = None
    try:
        with log.open("w") as file:
            # A session of its own: what it starts is ended with it.
            process = subprocess.Popen(
                words,
                cwd=root,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        process.wait(max(0.0, block.seconds - _GRACE))
    except subprocess.TimeoutExpired:
        late = True
    except OSError as error:
        problem = str(error)
    finally:
        if process is not None:
            _end(process)
    code = process.returncode if process else None
    status = "failed" if problem else "out of time" if late else "failed" if code else "ok"
    reason = problem or (f"exit code {code}" if status == "failed" else "")
    tail = "" if status == "ok" or problem else _tail(log, root)
    return Outcome(block.name, status, time.monotonic() - start, block.seconds, list(words), code, reason, tail)


def _end(process: subprocess.Popen) -> None:
    """End a process and all that it started: first asked to, then by force."""
    for kind, patience in ((signal.SIGINT, _GRACE * 0.8), (signal.SIGKILL, None)):
        if process.poll() is None:
            os.killpg(process.pid, kind)
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
    try:
        os.killpg(process.pid, signal.SIGKILL)  # children that outlived it
    except ProcessLookupError:
        pass


def _tail(log: Path, root: Path, lines: int = 20) -> str:
    text = log.read_text(errors="replace").replace(f"{root}{os.sep}", "")
    return "\n".join(text.splitlines()[-lines:])
