"""Benchmark the ops against torch; peers that need compilation are in the block peers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import torch

from bench.cases import table
from bench.cases.ops import GPU_OPS
from bench.engine.case import Entry, Sweep
from bench.gpu_report.block import Options, Results, run
from bench.gpu_report.measured import measure_rows

_BACKENDS = ("triton", "cuda")


def entries(device: str) -> Iterator[Entry]:
    """Yield the rows, the most informative first."""
    if device == "cpu":
        rows = table.entries(Sweep(("tiny",), context=(256,), dtypes=(torch.float32,)), flex=False)
        wanted = {"pool_chunks/mean", "append_kv/rows", "paged_attention/batch", "mixed_attention/random_passages"}
        yield from (row for row in rows if f"{row.op}/{row.case}" in wanted)
        return
    at = functools.partial(_rows, device)
    yield from at("llama3-8b", (4096,))
    yield from at("llama3-8b", (4096,), "interleaved", "random_passages")
    yield from at("llama3-8b", (4096, 65536), "batch")
    # Prompts with as many rows as the paper's have slots, and of the full text.
    yield from at("llama3-8b", (128, 256, 512, 1024, 2048, 4096, 16384), "causal")
    # The shapes of MagiAttention's charts: 64 query heads, 8 key/value heads.
    yield from at("llama3-70b", (4096, 1024, 2048, 8192, 16384), "documents", "blocks")
    yield from at("llama3-70b", (4096,), "causal", "random_passages")
    # One query head per key/value head.
    yield from at("llama2-7b", (4096,), "causal", "random_passages")
    yield from at("llama2-7b", (4096,))


def _rows(device: str, preset: str, contexts: Sequence[int], *cases: str) -> Iterator[Entry]:
    """Yield the rows of the given cases, or of those in every sweep."""
    for context in contexts:
        sweep = Sweep((preset,), context=(context,), dtypes=(torch.bfloat16,), device=device)
        sweep = dataclasses.replace(sweep, batch=(1, 32), table=(0, 131072))
        for row in table.entries(sweep, flex=False, ops=GPU_OPS):
            if row.case in cases if cases else not row.on_request:
                yield row


def block(options: Options, results: Results) -> None:
    """Measure the rows while time remains."""
    bad = measure_rows(entries(options.device), options, results, backends=_BACKENDS)
    if bad:
        raise SystemExit(f"wrong or failed: {', '.join(bad)}")


if __name__ == "__main__":
    raise SystemExit(run("ops", block))
