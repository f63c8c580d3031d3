"""Count the matrix work that kernels issue over the work a mask needs: ``python -m bench.work``; needs no GPU.

The work needed is the number of row pairs that a mask allows, times the query heads. The work issued is whole tiles.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch

import refrag_kernels as rk
from bench.cases.presets import PRESETS
from bench.cases.prompts import Passages, Prompt
from refrag_kernels import tile_lists
from refrag_kernels.plan import TILE
from refrag_kernels.reference.mask import allowed_pairs

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu-work.md"
_ARCHITECTURE = "sm_90"


@dataclasses.dataclass(frozen=True)
class Problem:
    """A mask of the benchmarks and the heads that share its keys."""

    name: str
    layout: rk.ChunkLayout
    mask: rk.ChunkMask
    causal: bool
    preset: str
    encoder: bool = False

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        shape = PRESETS[self.preset]
        return 1 if self.encoder else shape.heads // shape.kv_heads

    @property
    def head_dim(self) -> int:
        shape = PRESETS[self.preset]
        return shape.encoder_hidden_size // shape.encoder_heads if self.encoder else shape.head_dim

    def plan(self) -> rk.AttentionPlan:
        """Return the plan, with the tile lists of GPU kernels."""
        with mock.patch.object(tile_lists, "wanted", lambda device: True):
            return rk.plan_attention(self.layout, self.mask, causal=self.causal)

    def dense(self) -> torch.Tensor:
        """Return the allowed row pairs as a dense mask."""
        return allowed_pairs(self.layout, self.mask, causal=self.causal)


def problems() -> Iterator[Problem]:
    """Yield the masks that ``make bench`` measures, with and without grouped query heads."""
    for preset in ("llama3.2-1b", "llama2-7b"):
        for rows, density in ((2048, 0.12), (2048, 0.237), (4096, 0.06), (4096, 0.265)):
            passages = Passages(rows, 16, density)
            mask = rk.ChunkMask.from_dense(passages.chunk_mask())
            name = f"passages of {passages.passage}, {rows} rows, {density:.1%}"
            yield Problem(name, passages.layout(), mask, False, preset)
        prompt = Prompt(16384, 16, 0.0).layout()
        yield Problem(f"prompt of {prompt.total_rows} rows, causal", prompt, rk.ChunkMask.full(), True, preset)
    for length in (8, 16, 32):
        chunks = rk.ChunkLayout.from_lengths([[length] * (2048 // length)])
        name = f"encoder, {2048 // length} chunks of {length}"
        yield Problem(name, chunks, rk.ChunkMask.diagonal(), False, "smollm2-135m", True)
    sentences = rk.ChunkLayout.from_lengths([[16 + 7 * i % 17 for i in range(85)]])  # 2040 rows
    yield Problem("encoder, 85 chunks of 16 to 32", sentences, rk.ChunkMask.diagonal(), False, "smollm2-135m", True)


def by_plan(plan: rk.AttentionPlan) -> int:
    """Return the pairs in the plan's 16 x 16 tiles, which the C++ kernels issue."""
    return plan.stats()["pairs_computed"]


def by_triton(plan: rk.AttentionPlan, group: int, head_dim: int) -> float:
    """Return the pairs that Triton's forward kernel issues per query head, in tiles filled with heads and blocks."""
    from refrag_kernels.triton_kernels import attention, launch

    tiles = attention.tiles_of("forward", _ARCHITECTURE, plan.tensors(), group, launch.width(head_dim), 2, False)
    work_items, _, _ = tile_lists.tensors_of(plan.tiles, tile_lists.TileList(False, tiles.blocks))
    _, partial, full, _, _ = work_items.long().diff(dim=0).unbind(1)
    steps = tiles.block_n // TILE
    keys = full * 64 + (partial + steps - 1) // steps * tiles.block_n
    programs = -(-group // tiles.heads)  # per tile; the last one may be partly empty
    return float(keys.sum()) * 16 * tiles.blocks * tiles.heads * programs / group


def by_blocks(dense: torch.Tensor, side: int) -> int:
    """Return the pairs in the ``side`` x ``side`` blocks with an allowed pair, as in flex_attention's block mask."""
    rows, keys = (-(-length // side) * side for length in dense.shape)
    padded = torch.zeros(rows, keys, dtype=torch.bool)
    padded[: dense.shape[0], : dense.shape[1]] = dense
    return int(padded.view(rows // side, side, keys // side, side).any(3).any(1).sum()) * side * side


def by_flashinfer(dense: torch.Tensor, group: int, head_dim: int) -> float:
    """Return a lower bound of the pairs that FlashInfer's VariableBlockSparseAttentionWrapper issues per query head.

    Rows with the same mask form a block. A block of rows, times the heads that share keys, is split into tiles of query
    rows; one tile size, chosen by the mean, applies to all (FA2DetermineCtaTileQ in its include/flashinfer/utils.cuh).
    Keys are gathered one by one, and rounded up here to the 16 of a matrix instruction, the smallest possible tile.
    """
    _, counts = torch.unique_consecutive(dense, dim=0, return_counts=True)
    keys = dense[counts.cumsum(0) - 1].sum(1)
    packed = counts * group
    mean = float(packed.double().mean())
    tile = 128 if mean > 64 and head_dim < 256 else 64 if mean > 16 else 16
    return float((-(-packed // tile) * tile * (-(-keys // 16) * 16)).sum()) / group


def table() -> list[str]:
    """Return the ratio of work issued to work needed, as the lines of a Markdown table."""
    lines = [
        "| mask | query heads per key head | C++, tiles of 16 | Triton | flex_attention, blocks of 128 | FlashInfer |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for problem in problems():
        plan, dense = problem.plan(), problem.dense()
        needed = int(dense.sum())
        issued = [by_plan(plan), by_triton(plan, problem.group, problem.head_dim), by_blocks(dense, 128)]
        cells = [f"{pairs / needed:.2f}" for pairs in issued]
        # FlashInfer's block-sparse kernel has no causal blocks; its dense kernel handles such a prompt.
        cells += ["-" if problem.causal else f"{by_flashinfer(dense, problem.group, problem.head_dim) / needed:.2f}"]
        lines.append(f"| {problem.name} | {problem.group} | " + " | ".join(cells) + " |")
    return lines


_BEFORE = """# Work that GPU kernels issue

The ratio of the matrix work issued (whole tiles) to the work that a mask needs (the pairs of rows it allows). These
are counts, not times; for times, see [GPU results](gpu-results.md). `python -m bench.work` writes this page and
documents how each column is counted; `test_work.py` checks the counts.

"""
_AFTER = """
C++ refers to the kernels of `csrc/cuda`, Triton to the 16-bit forward kernel in its configuration for sm_90. With up
to three query heads per key head, a Triton tile has the rows of four blocks of 16 and reads up to 64 keys at a time.
If blocks attend to fewer than 64 keys on average, as in the chunk encoder, a tile has one block and reads 16 keys.
Two chunks of 8 share a tile, which doubles their work: matrix instructions (m16n8k16; 16 x 16 on AMD) have 16 rows.
Chunks of uneven lengths begin inside blocks of 16 rows, which then attend to the keys of two or three chunks.
FlashInfer refers to VariableBlockSparseAttentionWrapper with rows of equal masks as blocks and keys rounded to 16, a
lower bound of its work. For flex_attention, the count is that of its own `create_block_mask`.

`embed_mixed` moves at most 1.1 times the bytes it needs (weights, chunks, token rows and output once each, the hidden
layer twice), counted from the memory accesses of its kernels in Triton's interpreter, each address once per launch
(`test_interpreted_work.py`). `python -m bench.roofline` combines such counts with published rates of GPUs into a
model.
"""


def page() -> str:
    """Return the text of docs/gpu-work.md."""
    return _BEFORE + "\n".join(table()) + "\n" + _AFTER


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser("python -m bench.work", description=__doc__)
    parser.add_argument("--output", type=Path, help=f"write the page to this file, such as docs/{PAGE.name}")
    options = parser.parse_args(arguments)
    if options.output:
        options.output.write_text(page())
    else:
        print(page(), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
