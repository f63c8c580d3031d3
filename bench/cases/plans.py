"""Cases of plan_attention and visible_ranges, which run once per batch on the CPU."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch

import refrag_kernels as rk
from bench.cases import peers
from bench.cases.problems import of_passages
from bench.cases.prompts import Passages, Prompt
from bench.engine.case import ANY, Case, Entry, Sweep


def _passages(context: int, k: int, density: float) -> Case:
    passages = Passages(context, k, density)
    layout, mask, problem = passages.layout(), rk.ChunkMask.from_dense(passages.chunk_mask()), of_passages(passages)
    return Case(
        ours=lambda: rk.plan_attention(layout, mask, causal=False),
        peers={"create_block_mask, block 128": lambda: peers.block_mask(problem, 128, "cpu")},
        on_host=True,
    )


def _prompt(context: int, k: int, expand: float) -> Case:
    layout = Prompt(context, k, expand).layout()
    rows = layout.total_rows

    def block_mask():
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(lambda b, h, i, j: i >= j, None, None, rows, rows, device="cpu")

    plan = {"create_block_mask, block 128": block_mask}
    return Case(ours=lambda: rk.plan_attention(layout), peers=plan, on_host=True)


def _ranges(context: int, k: int) -> Case:
    """The last row of a prompt with a passage mask, for a decode step; the peer writes the row of a dense mask."""
    layout = Prompt(context, k, 0.0).layout()
    of_chunk = torch.tensor([-1, *(i * k // 128 for i in range(layout.num_chunks - 2)), -1])
    mask, last = rk.ChunkMask.passages(of_chunk), torch.tensor([layout.total_rows // 2])
    of_row = of_chunk.repeat_interleave(layout.chunk_offsets.diff())

    def row_of_mask() -> torch.Tensor:
        mine = of_row[last]
        return (mine == -1) | (of_row == -1) | (of_row == mine)

    peer = {"a row of a bool mask": row_of_mask}
    return Case(ours=lambda: rk.visible_ranges(layout, mask, last), peers=peer, on_host=True)


def entries(sweep: Sweep) -> Iterator[Entry]:
    """Yield the rows of the planner, which have no dtype or preset."""
    for context, k in itertools.product(sweep.context, sweep.k):
        at = {"context": context, "k": k}
        for density in sweep.density:
            if density < 1:
                make = functools.partial(_passages, context, k, density)
                yield Entry("plan_attention", "passages", ANY, torch.int32, {**at, "density": density}, make)
        for expand in sweep.expand:
            make = functools.partial(_prompt, context, k, expand)
            yield Entry("plan_attention", "prompt", ANY, torch.int32, {**at, "expand": expand}, make)
        yield Entry("visible_ranges", "decode", ANY, torch.int32, at, functools.partial(_ranges, context, k))
