"""Run a call of each op under compute-sanitizer: racecheck, synccheck and memcheck in parallel."""

from __future__ import annotations

import os
import re

from bench.gpu_report import cuda_tools, pytest_runs
from bench.gpu_report.block import Options, Results, run

_SAMPLE = "tests/gpu/test_gpu_sample.py"
_TOOLS = ("racecheck", "synccheck", "memcheck")


def block(options: Options, results: Results) -> None:
    """Run the sample under each tool; on the CPU, run a test of it without a tool."""
    sanitizer = cuda_tools.find("compute-sanitizer")
    if options.dry_run:
        commands = {"none": pytest_runs.command(results, _SAMPLE, "-k", "pool_chunks-triton", tool="none")}
    elif sanitizer is None:
        results.add("compute-sanitizer", status="skipped", reason="not installed")
        return
    else:
        commands = {
            tool: [
                *(sanitizer, "--tool", tool, "--error-exitcode", "99"),
                *pytest_runs.command(results, _SAMPLE, tool=tool),
            ]
            for tool in _TOOLS
        }

    def ended(tool: str, code: int, said: str) -> None:
        summary = re.findall(r"^=+ (.*SUMMARY.*)$", said, re.M)
        results.add(tool, clean=code == 0, exit_code=code, said="; ".join(summary))

    # Without torch's caching allocator, each tensor is a separate allocation with checked bounds.
    if failed := pytest_runs.run(commands, {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, ended):
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    raise SystemExit(run("sanitizers", block))
