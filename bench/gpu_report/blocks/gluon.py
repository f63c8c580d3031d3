"""The Hopper kernel in Gluon: compile it, check it on small problems, and time it against Triton and torch.

The kernel runs in processes that are ended when they stop writing, so that a hang costs time but no other results.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from bench.gpu_report import watched
from bench.gpu_report.block import Options, Results, run

_WORKER = "bench.gpu_report.gluon_worker"
_COMPILERS = 12
_START, _PATIENCE = 40.0, 20.0  # seconds until a process's first line, and between lines
_END = 5.0  # seconds for a process to start and exit


def block(options: Options, results: Results) -> None:
    """Check every configuration, then time the correct ones; after a hang or failure, continue with the next."""
    if not options.dry_run:
        _compile(options, results)
    first, right, hung = 0, [], True
    while hung and options.seconds_left > _END:
        hung = False
        begun = {}
        try:
            for line in _lines(options, first, right):
                if "begin" in line:
                    begun = line
                    continue
                results.add(**line)
                if "right" in line:
                    first += 1
                    right += [line["config"]] if line["right"] else []
        except (watched.Silent, RuntimeError) as error:
            results.add("hang" if isinstance(error, watched.Silent) else "failure", **begun, reason=str(error))
            hung = begun.get("checks", False)
            first += hung
    results.add("verdict", right=right, checked=first)


def _command(options: Options, *arguments: object) -> list[str]:
    return [sys.executable, "-m", _WORKER, "--device", options.device, *map(str, arguments)]


def _lines(options: Options, first: int, right: list[str]) -> Iterator[dict[str, Any]]:
    arguments = ["--first", first, "--seconds", max(1.0, options.seconds_left - _END), "--right", *right]
    slower = 10 if options.dry_run else 1
    return watched.lines(
        _command(options, *arguments),
        start=slower * _START,
        patience=slower * _PATIENCE,
        deadline=time.monotonic() + slower * max(1.0, options.seconds_left),
    )


def _compile(options: Options, results: Results) -> None:
    """Fill Triton's cache with one process per configuration, since each compiles for seconds."""
    start = time.monotonic()
    running = [
        subprocess.Popen(_command(options, "--compile", part, _COMPILERS), stdout=subprocess.DEVNULL)
        for part in range(_COMPILERS)
    ]
    codes = []
    for process in running:
        try:
            codes.append(process.wait(max(1.0, min(30.0, options.seconds_left / 2) - (time.monotonic() - start))))
        except subprocess.TimeoutExpired:
            process.kill()
            codes.append(None)
    results.add("compile", seconds=round(time.monotonic() - start, 1), codes=codes)


if __name__ == "__main__":
    raise SystemExit(run("gluon", block))
