"""Benchmark attention against flex_attention, which takes seconds to compile, and against other libraries."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.cases import attention
from bench.engine.case import Entry, Sweep
from bench.gpu_report.block import Options, Results, run
from bench.gpu_report.measured import measure_rows

_ROWS = (
    ("llama3-8b", "passages"),
    ("llama3-70b", "documents"),
    ("llama3-70b", "blocks"),
    ("llama3-8b", "random_passages"),
    ("llama3-8b", "interleaved"),
    ("llama3-70b", "causal"),
)


def entries(device: str) -> Iterator[Entry]:
    """Yield the cases, with 4,096 rows each; on the CPU a single one, without flex_attention."""
    wanted = (("tiny", "documents"),) if device == "cpu" else _ROWS
    context, dtype = (256, torch.float32) if device == "cpu" else (4096, torch.bfloat16)
    for preset, case in wanted:
        sweep = Sweep((preset,), context=(context,), dtypes=(dtype,), device=device)
        yield from (row for row in attention.entries(sweep, flex=device != "cpu") if row.case == case)


def block(options: Options, results: Results) -> None:
    """Measure the rows while time remains."""
    if bad := measure_rows(entries(options.device), options, results, backends=("triton",), memory=False):
        raise SystemExit(f"wrong or failed: {', '.join(bad)}")


if __name__ == "__main__":
    raise SystemExit(run("peers", block))
