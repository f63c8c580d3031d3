"""The benchmarks of the ops: LLaMA-3-8B's shapes against torch first, then one query head a key."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench import table
from bench.case import Entry, Sweep
from bench.gpu_report.block import Options, Results, run
from bench.gpu_report.measured import measure_rows

_OPS = (
    "mixed_attention",
    "paged_attention",
    "append_kv",
    "merge_states",
    "pool_chunks",
    "project_chunks",
    "embed_mixed",
)
_BACKENDS = ("triton", "cuda")


def entries(device: str) -> Iterator[Entry]:
    """Yield the rows, those that tell most first."""
    if device == "cpu":
        rows = table.entries(Sweep(("tiny",), context=(256,), dtypes=(torch.float32,)), flex=False)
        yield from (row for row in rows if row.op in ("pool_chunks", "append_kv"))
        return
    for preset in ("llama3-8b", "llama2-7b"):
        rows = table.entries(Sweep((preset,), dtypes=(torch.bfloat16,), device=device), flex=False)
        yield from (row for row in rows if row.op in _OPS)


def block(options: Options, results: Results) -> None:
    """Measure the rows while there is time."""
    bad = measure_rows(entries(options.device), options, results, backends=_BACKENDS)
    if bad:
        raise SystemExit(f"wrong or failed: {', '.join(bad)}")


if __name__ == "__main__":
    raise SystemExit(run("ops", block))
