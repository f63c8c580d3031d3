"""Test every op against float64 on CUDA tensors, with Triton and CUDA C++, in many processes."""

from __future__ import annotations

import os

from bench.gpu_report import pytest_runs
from bench.gpu_report.block import Options, Results, run

_PROCESSES = 14  # each spends its time compiling one kernel at a time
# The largest group comes last, since it may be cut short.
_FILES = ("tests/kernels/test_pooling_cuda.py", "tests/gpu/test_gpu_ops.py")
_FEW = ("tests/gpu/test_gpu_ops.py", "-k", "pool_chunks-triton-float32-0] or merge_states-triton-float32-1]")


def block(options: Options, results: Results) -> None:
    """Run the tests in shards."""
    shards = 1 if options.dry_run else max(1, min(_PROCESSES, (os.cpu_count() or 1) - 1))
    tests = _FEW if options.dry_run else _FILES
    commands = {
        f"shard {number}": pytest_runs.command(results, *tests, shard=f"{number}/{shards}") for number in range(shards)
    }
    if failed := pytest_runs.run(commands):
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    raise SystemExit(run("tests", block))
