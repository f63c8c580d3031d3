"""Run a block in its own process with a time limit; results written before the limit are kept."""

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

_GRACE = 3.0  # seconds between SIGTERM and SIGKILL
_START = 8.0  # seconds for a process to import torch and to exit


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a block: "ok", "failed", "out of time" or "absent"."""

    name: str
    status: str
    seconds: float
    limit: float
    command: list[str]
    code: int | None = None
    reason: str = ""
    tail: str = ""


def command(block: Block, device: str, results: Path) -> list[str]:
    """Return the command that runs a block. It gets less time than its limit, so that it can finish on its own."""
    seconds = max(0.6 * block.seconds, block.seconds - _START)
    options = ("--device", device, "--seconds", f"{seconds:.1f}", "--results", str(results))
    return [sys.executable, "-m", block.module, *options]


def run(
    block: Block, words: Sequence[str], log: Path, root: Path, environment: Mapping[str, str] | None = None
) -> Outcome:
    """Run a command in ``root`` for at most ``block.seconds``, with its output in ``log``."""
    if block.absent:
        return Outcome(block.name, "absent", 0.0, block.seconds, [])
    start, late, problem = time.monotonic(), False, ""
    process: subprocess.Popen | None = None
    try:
        with log.open("w") as file:
            # In its own session, so that its child processes end with it.
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
    """End a process and its children: first SIGTERM, then SIGKILL."""
    for kind, patience in ((signal.SIGINT, _GRACE * 0.8), (signal.SIGKILL, None)):
        if process.poll() is None:
            os.killpg(process.pid, kind)
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
    try:
        os.killpg(process.pid, signal.SIGKILL)  # remaining children
    except ProcessLookupError:
        pass


def _tail(log: Path, root: Path, lines: int = 20) -> str:
    text = log.read_text(errors="replace").replace(f"{root}{os.sep}", "")
    return "\n".join(text.splitlines()[-lines:])
