"""Test plans with a capacity, refilled in place, and ops in captured CUDA graphs, with the CUDA C++ kernels' values."""

from __future__ import annotations

from bench.gpu_report import pytest_runs
from bench.gpu_report.block import Options, Results, run

_GROUPS = {
    "graphs": ("tests/gpu/test_gpu_graphs.py",),
    "capacity": ("tests/gpu/test_gpu_ops.py", "-k", "capacity"),
    "CUDA C++": ("tests/kernels/test_cuda_kernels.py",),
}


def block(options: Options, results: Results) -> None:
    """Run groups of tests in parallel; on the CPU, where plain calls replace graphs, only the first."""
    groups = ["graphs"] if options.dry_run else list(_GROUPS)
    if failed := pytest_runs.run({name: pytest_runs.command(results, *_GROUPS[name]) for name in groups}):
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    raise SystemExit(run("graphs", block))
