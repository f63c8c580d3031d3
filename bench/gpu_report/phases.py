"""Commands that share a time: each ends when its own is over, and what one leaves over the next may use."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_GRACE = 5.0  # seconds from the request to end to the end by force


@dataclasses.dataclass(frozen=True)
class Phase:
    """Commands that run side by side, and the seconds that they have.

    ``{limit}`` in a word of a command becomes the seconds that are left, less those that it takes to write results.
    """

    name: str
    seconds: float
    commands: Sequence[tuple[str, ...]]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    skip: str | None = None  # why it can't run here


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a phase ended: "ok", "failed", "out of time" or "skipped"."""

    name: str
    status: str
    seconds: float
    limit: float
    commands: list[str]
    codes: list[int | None]
    reason: str = ""
    tail: str = ""


def run(phases: Sequence[Phase], folder: Path, root: Path) -> list[Outcome]:
    """Run phases one after another from ``root``, each whatever became of those before; logs go to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    start, end, outcomes = time.monotonic(), 0.0, []
    for phase in phases:
        end += phase.seconds
        limit = start + end - time.monotonic()
        print(f"==> {phase.name}: {phase.skip or f'up to {limit:.0f} s'}", flush=True)
        outcomes.append(_run(phase, limit, folder, root))
        print(
            f"    {outcomes[-1].status} after {outcomes[-1].seconds:.0f} s {outcomes[-1].reason}".rstrip(), flush=True
        )
    return outcomes


def _run(phase: Phase, limit: float, folder: Path, root: Path) -> Outcome:
    commands = [
        [word.replace("{limit}", f"{max(0.0, 0.9 * limit - _GRACE):.0f}") for word in c] for c in phase.commands
    ]
    shown = [shlex.join(command) for command in commands]
    if phase.skip:
        return Outcome(phase.name, "skipped", 0.0, limit, shown, [], phase.skip)
    start = time.monotonic()
    logs = [folder / f"{phase.name}-{number}.log" for number in range(len(commands))]
    environment = {**os.environ, **phase.environment}
    running: list[subprocess.Popen] = []
    late = False
    try:
        for command, log in zip(commands, logs):
            with log.open("w") as file:
                # A session of its own: its processes are ended together.
                running.append(
                    subprocess.Popen(
                        command,
                        cwd=root,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        late = not _wait(running, start + limit - _GRACE)
    except OSError as error:
        return Outcome(phase.name, "failed", time.monotonic() - start, limit, shown, [], str(error))
    finally:
        _end(running)
    codes = [process.returncode for process in running]
    status = "out of time" if late else "failed" if any(codes) else "ok"
    tail = "" if status == "ok" else "\n".join(_tail(log, root) for log, code in zip(logs, codes) if code)
    reason = f"exit code {', '.join(map(str, codes))}" if status == "failed" else ""
    return Outcome(phase.name, status, time.monotonic() - start, limit, shown, codes, reason, tail)


def _wait(running: Sequence[subprocess.Popen], deadline: float) -> bool:
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
    return True


def _end(running: Sequence[subprocess.Popen]) -> None:
    """End what still runs of the processes started here and of theirs: first asked to, then by force."""
    for kind, patience in ((signal.SIGINT, _GRACE / 2), (signal.SIGKILL, None)):
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, kind)
        for process in running:
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                continue


def _tail(log: Path, root: Path, lines: int = 20) -> str:
    text = log.read_text(errors="replace").replace(f"{root}{os.sep}", "")
    return "\n".join(text.splitlines()[-lines:])
