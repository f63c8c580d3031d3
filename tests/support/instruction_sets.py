"""Run a test module's check on instruction sets other than this machine's best, each in a new process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from refrag_kernels import extension

LOWER = ("avx512", "avx2", "portable")  # below the best one, which all other tests use


def run_on(isa: str, module: str, function: str) -> None:
    """Call a function of a test module in a new process that uses ``isa``; ``""`` selects the best one.

    The instruction set is chosen once per process. The process starts in this folder, because Python searches its
    working directory first, and the root has the checkout's package, not the build under test (``make test-asan``).
    """
    code = f"""
import torch, {module}
from refrag_kernels import extension
assert extension.__file__ == {extension.__file__!r}, extension.__file__
{module}.{function}()
assert {isa!r} in ("", torch.ops.refrag_cpu.active_isa())  # loaded by now
"""
    environment = os.environ | {"REFRAG_KERNELS_ISA": isa, "OMP_NUM_THREADS": "2"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if f"{isa}, which this machine can't run" in done.stderr:
        pytest.skip(f"this machine can't run {isa}")
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"
