"""Tests as a block: pytest in several processes, each test a line of results as soon as it is there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from bench.gpu_report.block import Results

_NO_TESTS = 5  # pytest's exit code where a shard has none


def command(results: Results, *arguments: str, tool: str = "", shard: str = "0/1") -> list[str]:
    """Return the command that runs a share of some tests and appends to the file of results."""
    name = f"{results.block}:{tool}" if tool else results.block
    plugins = ("-p", "bench.gpu_report.pytest_record", "-p", "no:cacheprovider", "-p", "no:xdist")
    record = ("--record", str(results.path), "--record-as", name, "--shard", shard)
    return [sys.executable, "-m", "pytest", "-q", *plugins, *record, *arguments]


def run(
    commands: Mapping[str, Sequence[str]],
    environment: Mapping[str, str] | None = None,
    ended: Callable[[str, int, str], None] | None = None,
) -> list[str]:
    """Run commands side by side, print what each said as it ends, and return the names of those that failed.

    They are in the block's group of processes, so that they end with it. ``ended`` is called with each one's name, exit
    code and output.
    """

    def one(name: str) -> tuple[str, int, str]:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(commands[name], env=environment, text=True, errors="replace", check=False, **pipes)
        return name, done.returncode, done.stdout

    failed = []
    with ThreadPoolExecutor(max(1, len(commands))) as pool:
        for future in as_completed([pool.submit(one, name) for name in commands]):
            name, code, said = future.result()
            print(f"--- {name}: exit code {code}\n{said}", flush=True)
            if ended is not None:
                ended(name, code, said)
            if code not in (0, _NO_TESTS):
                failed.append(name)
    return failed
