"""The table of cases: the rows of a sweep, and the published set with its goals."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator

import torch

from bench.cases import attention, decoding, paged, plans, rows
from bench.cases.ops import MODEL_OPS, OPS
from bench.engine.case import Entry, Goal, Sweep


def entries(sweep: Sweep, flex: bool = True, ops: Collection[str] = OPS) -> Iterator[Entry]:
    """Yield every row of a sweep for these ops. Import the model's cases only for ops of the model."""
    kernels = (decoding.entries, paged.entries, rows.entries, plans.entries)
    found = itertools.chain(attention.entries(sweep, flex), *(make(sweep) for make in kernels))
    if not set(ops).isdisjoint(MODEL_OPS):
        from bench.cases import model

        found = itertools.chain(found, model.entries(sweep))
    return (entry for entry in found if entry.op in ops)


# The published set: parameter values, and the ops and cases that use them.
_SMALL = Sweep()
_LARGE = dataclasses.replace(_SMALL, presets=("llama3.2-1b",), context=(2048,))
_DECODE = dataclasses.replace(_SMALL, presets=("llama3-8b",))
_PROMPTS = dataclasses.replace(_SMALL, context=(4096 * 4,), presets=("smollm2-135m", "llama3.2-1b"))
_PUBLISHED: list[tuple[Sweep, set[str]]] = [
    (dataclasses.replace(_SMALL, density=(0.06, 0.265, 1.0)), {"mixed_attention/passages"}),
    (dataclasses.replace(_LARGE, density=(0.12, 0.237)), {"mixed_attention/passages"}),
    (_PROMPTS, {"mixed_attention/prompt"}),
    (dataclasses.replace(_SMALL, context=(8192,)), {"mixed_attention/encoder"}),
    (_LARGE, {"mixed_attention/backward"}),
    (_DECODE, {"paged_attention/decode", "append_kv/rows", "merge_states/rows"}),
    (dataclasses.replace(_SMALL, context=(4096, 65536)), {"embed_mixed/mixed", "project_chunks/chunks"}),
    (_SMALL, {"pool_chunks/mean", "linear_rows/head", "plan_attention/prompt", "visible_ranges/decode"}),
    (dataclasses.replace(_SMALL, density=(0.06,)), {"plan_attention/passages"}),
    (dataclasses.replace(_SMALL, context=(1024,)), {"attention_received/text"}),
    (dataclasses.replace(_SMALL, k=(8,)), {"select_chunk_rows/scores", "select_chunk_rows/unlike"}),
    (_SMALL, {"ttft/prompt"}),
    (dataclasses.replace(_SMALL, context=(512, 4096)), {"decode/prompt"}),
    (_SMALL, {"passage_cache/read"}),
    (dataclasses.replace(_SMALL, context=(2048,), expand=(1.0,)), {"passage_cache/read"}),
    (dataclasses.replace(_SMALL, k=(8,)), {"kv_slots/read"}),
]


def published(flex: bool = True, ops: Collection[str] = OPS) -> list[Entry]:
    """Return the rows that ``make bench`` measures."""
    return [
        entry
        for sweep, wanted in _PUBLISHED
        for entry in entries(sweep, flex, ops)
        if f"{entry.op}/{entry.case}" in wanted
    ]


def goal_of(entry: Entry) -> Goal:
    """Return a row's goal; most rows have none."""
    return _GOALS.get(entry.name, Goal())


def _goals() -> dict[str, Goal]:
    float32, bfloat16 = "float32", "bfloat16"
    goals = {}
    by_share = {  # speed-up over the best peer, share of the matmul rate
        "sparse": {float32: (2.0, 1.00), bfloat16: (4.2, 0.70)},
        "quarter": {float32: (1.4, 1.05), bfloat16: (2.5, 0.85)},
        "dense": {float32: (1.25, 1.08), bfloat16: (2.3, 0.80)},
    }
    for where, kind in (
        ("smollm2-135m/context=4096/k=16/density=0.06", "sparse"),
        ("smollm2-135m/context=4096/k=16/density=0.265", "quarter"),
        ("smollm2-135m/context=4096/k=16/density=1", "dense"),
        ("llama3.2-1b/context=2048/k=16/density=0.12", "sparse"),
        ("llama3.2-1b/context=2048/k=16/density=0.237", "quarter"),
    ):
        for dtype, (ratio, share) in by_share[kind].items():
            goals[f"mixed_attention/passages/{where}/{dtype}"] = Goal(ratio, share_of_matmul=share)
    for dtype, ratio in ((float32, 1.25), (bfloat16, 2.2)):
        for preset in ("smollm2-135m", "llama3.2-1b"):
            goals[f"mixed_attention/prompt/{preset}/context=16384/k=16/expand=0/{dtype}"] = Goal(ratio)
    for dtype, small, large in ((float32, 1.15, 1.1), (bfloat16, 1.6, 1.35)):
        goals[f"embed_mixed/mixed/smollm2-135m/context=4096/k=16/{dtype}"] = Goal(small)
        goals[f"embed_mixed/mixed/smollm2-135m/context=65536/k=16/{dtype}"] = Goal(large)
        goals[f"mixed_attention/encoder/smollm2-135m/context=8192/k=16/{dtype}"] = Goal(2.0)
        goals[f"mixed_attention/backward/llama3.2-1b/context=2048/k=16/density=0.12/{dtype}"] = Goal(2.0)
        goals[f"paged_attention/decode/llama3-8b/context=4096/{dtype}"] = Goal(share_of_bandwidth=0.75)
    goals["plan_attention/passages/any/context=4096/k=16/density=0.06/int32"] = Goal(50.0)
    return goals


_GOALS = _goals()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
