"""Measure time to first token with LLaMA-2-7B's shapes, compressed and in full; check two layers against float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from bench.cases import model
from bench.engine.case import Entry, Sweep
from bench.gpu_report.block import Options, Results, run
from bench.gpu_report.measured import measure_rows

_WHOLE = "llama2-7b"
_CUT = "llama2-7b-2-layers"  # few enough layers to compare with float64


def groups(device: str) -> Iterator[tuple[list[Entry], dict[str, Any]]]:
    """Yield groups of rows with their options; full-text times don't depend on k, so they are measured once."""
    timed = {"refcheck": False, "memory": False, "rounds": 2}
    if device == "cpu":
        yield _rows("tiny", (256,), (16,), device), {}
        return
    yield _rows(_WHOLE, (4096, 16384), (16,), device), timed
    yield _rows(_CUT, (4096,), (16,), device), {"rounds": 1}
    yield _rows(_WHOLE, (65536,), (16,), device), timed
    yield _rows(_WHOLE, (4096, 16384, 65536), (8, 32), device), {**timed, "with_peers": False}


def _rows(preset: str, contexts: tuple[int, ...], ks: tuple[int, ...], device: str) -> list[Entry]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    sweep = Sweep((preset,), k=ks, context=contexts, dtypes=(dtype,), device=device)
    return [row for row in model.entries(sweep) if row.op == "ttft"]


def block(options: Options, results: Results) -> None:
    """Measure the rows while time remains."""
    bad = []
    for rows, how in groups(options.device):
        bad += measure_rows(rows, options, results, **how)
    if bad:
        raise SystemExit(f"wrong or failed: {', '.join(bad)}")


if __name__ == "__main__":
    raise SystemExit(run("ttft", block))
