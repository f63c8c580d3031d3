"""Run tests as a block: several pytest processes, each test's result written immediately."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from bench.gpu_report.block import Results

_NO_TESTS = 5  # pytest's exit code if no tests were collected


def command(results: Results, *arguments: str, tool: str = "", shard: str = "0/1") -> list[str]:
    """Return the command that runs a shard of tests and appends to the results file."""
    name = f"{results.block}:{tool}" if tool else results.block
    plugins = ("-p", "bench.gpu_report.pytest_record", "-p", "no:cacheprovider", "-p", "no:xdist")
    record = ("--record", str(results.path), "--record-as", name, "--shard", shard)
    return [sys.executable, "-m", "pytest", "-q", *plugins, *record, *arguments]


def run(
    commands: Mapping[str, Sequence[str]],
    environment: Mapping[str, str] | None = None,
    ended: Callable[[str, int, str], None] | None = None,
) -> list[str]:
    """Run commands in parallel, print their output as it comes, and return the names of those that failed.

    They belong to the block's process group, so that they end with it; output up to then is in its log. ``ended`` is
    called with each command's name, exit code and output.
    """

    def one(name: str) -> tuple[str, int, str]:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        said = []
        with subprocess.Popen(commands[name], env=environment, text=True, errors="replace", **pipes) as process:
            for line in process.stdout:
                print(f"{name}: {line}", end="", flush=True)
                said.append(line)
        return name, process.returncode, "".join(said)

    failed = []
    with ThreadPoolExecutor(max(1, len(commands))) as pool:
        for future in as_completed([pool.submit(one, name) for name in commands]):
            name, code, said = future.result()
            print(f"--- {name}: exit code {code}", flush=True)
            if ended is not None:
                ended(name, code, said)
            if code not in (0, _NO_TESTS):
                failed.append(name)
    return failed
