"""Tests as a block: pytest in several processes, each test a line of results as soon as it is there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence

from bench.gpu_report.block import Results

_NO_TESTS = 5  # pytest's exit code where a shard has none


def command(results: Results, *arguments: str, tool: str = "", shard: str = "0/1") -> list[str]:
    """Return the command that runs a share of some tests and appends to the file of results."""
    name = f"{results.block}:{tool}" if tool else results.block
    plugins = ("-p", "bench.gpu_report.pytest_record", "-p", "no:cacheprovider", "-p", "no:xdist")
    record = ("--record", str(results.path), "--record-as", name, "--shard", shard)
    return [sys.executable, "-m", "pytest", "-q", *plugins, *record, *arguments]


def run(commands: Mapping[str, Sequence[str]], environment: Mapping[str, str] | None = None) -> list[str]:
    """Run commands side by side, print what each said, and return the names of those that failed.

    They are in the block's group of processes, so that they end with it.
    """
    running = {
        name: subprocess.Popen(
            words,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, words in commands.items()
    }
    failed = []
    for name, process in running.items():
        said, _ = process.communicate()
        print(f"--- {name}: exit code {process.returncode}\n{said}", flush=True)
        if process.returncode not in (0, _NO_TESTS):
            failed.append(name)
    return failed
