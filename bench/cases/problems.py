"""Masks from other published benchmarks and from retrieval, in each contender's own format."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Sequence

import torch

import refrag_kernels as rk
from bench.cases.prompts import SHARED, Passages
from bench.engine.case import Skip


@dataclasses.dataclass(frozen=True)
class Problem:
    """Packed rows, each of which attends to up to two ranges of keys.

    Attributes
    ----------
    layout, mask, causal
        Arguments of ``plan_attention``.
    prefix, starts, ends : sequence of int
        Each row attends to keys [0, prefix) and [start, end).
    pieces : sequence of (int, sequence of (int, int)) or None
        For libraries with variable-length sequences: the number of consecutive rows and the key ranges they attend to.
        If ``causal``, the last row attends up to the last key, and each row before it to one key less. None if
        sequences can't express the mask.
    """

    layout: rk.ChunkLayout
    mask: rk.ChunkMask | None
    causal: bool
    prefix: Sequence[int]
    starts: Sequence[int]
    ends: Sequence[int]
    pieces: Sequence[tuple[int, Sequence[tuple[int, int]]]] | None

    @property
    def rows(self) -> int:
        return len(self.ends)

    def plan(self, device: str = "cpu") -> rk.AttentionPlan:
        return rk.plan_attention(self.layout, self.mask, causal=self.causal, device=device)

    @functools.cached_property
    def ranges(self) -> torch.Tensor:
        """Return prefix, start and end of each row, int32 [3, T]."""
        return torch.tensor([list(self.prefix), list(self.starts), list(self.ends)], dtype=torch.int32)

    def visible(self, first: int, last: int, device: str) -> torch.Tensor:
        """Return the keys that rows ``first`` to ``last`` attend to, bool [last - first, T]."""
        prefix, start, end = self.ranges[:, first:last, None].to(device)
        keys = torch.arange(self.rows, device=device)
        return (keys < prefix) | ((keys >= start) & (keys < end))

    def keys_of_pieces(self) -> list[int] | None:
        """Return the concatenated key indices of all pieces; None if they are the rows themselves."""
        assert self.pieces is not None
        keys = [key for _, ranges in self.pieces for start, end in ranges for key in range(start, end)]
        return None if keys == list(range(self.rows)) else keys


def causal(rows: int) -> Problem:
    """Return one causal sequence."""
    return documents_of([rows])


def documents(rows: int) -> Problem:
    """Return causal documents of random lengths, each at most a quarter of all rows."""
    return documents_of(_lengths(rows, max(1, rows // 32), max(1, rows // 4), random.Random(rows)))


def documents_of(lengths: Sequence[int]) -> Problem:
    """Return causal documents of these lengths."""
    rows, starts = sum(lengths), [start for start, length in _spans(lengths) for _ in range(length)]
    return Problem(
        layout=rk.ChunkLayout.from_lengths([[length] for length in lengths]),
        mask=None,
        causal=True,
        prefix=[0] * rows,
        starts=starts,
        ends=range(1, rows + 1),
        pieces=[(length, [(start, start + length)]) for start, length in _spans(lengths)],
    )


def blocks(rows: int) -> Problem:
    """Return block-causal documents with blocks of random lengths: a row attends to its own and earlier blocks."""
    choice = random.Random(rows)
    sequences = [
        _lengths(length, max(1, rows // 64), max(1, rows // 16), choice)
        for length in _lengths(rows, max(1, rows // 32), max(1, rows // 4), choice)
    ]
    starts = [start for start, length in _spans([sum(s) for s in sequences]) for _ in range(length)]
    return _block_causal(sequences, starts)


def interleaved(rows: int) -> Problem:
    """Return a text prefix, then alternating tokens and slots: each pair attends to itself and everything before it."""
    pairs, rest = divmod(rows - SHARED, 2)
    if pairs < 1:
        raise Skip(f"{rows} rows are too few for a prefix of {SHARED} and a pair")
    return _block_causal([[SHARED, *[2] * pairs, *([1] if rest else [])]], [0] * rows)


def random_passages(rows: int) -> Problem:
    """Return a causal prompt: a prefix, passages of 100 to 500 rows that attend to it and themselves, a question."""
    body = rows - 2 * SHARED
    if body < 1:
        raise Skip(f"{rows} rows are too few for a prefix and a question of {SHARED}")
    passages = _lengths(body, 100, 500, random.Random(rows))
    lengths = [SHARED, *passages, SHARED]
    spans = list(_spans(lengths))
    inner = [start for start, length in spans[1:-1] for _ in range(length)]
    return Problem(
        layout=rk.ChunkLayout.from_lengths([lengths]),
        mask=rk.ChunkMask.passages([-1, *range(len(passages)), -1]),
        causal=True,
        prefix=[0] * SHARED + [SHARED] * body + [0] * SHARED,
        starts=[0] * SHARED + inner + [0] * SHARED,
        ends=range(1, rows + 1),
        pieces=[
            (SHARED, [(0, SHARED)]),
            *((length, [(0, SHARED), (start, start + length)]) for start, length in spans[1:-1]),
            (SHARED, [(0, rows)]),
        ],
    )


def of_passages(passages: Passages) -> Problem:
    """Return the passages of ``bench.cases.prompts``, which are not causal."""
    spans = list(_spans(passages.spans()))
    rows, last = passages.rows, len(spans) - 1
    own = [(0, rows) if number == last else (start, start + length) for number, (start, length) in enumerate(spans)]
    of_row = [number for number, (_, length) in enumerate(spans) for _ in range(length)]
    return Problem(
        layout=passages.layout(),
        mask=rk.ChunkMask.from_dense(passages.chunk_mask()),
        causal=False,
        prefix=[0 if number in (0, last) else SHARED for number in of_row],
        starts=[own[number][0] for number in of_row],
        ends=[own[number][1] for number in of_row],
        pieces=[
            (length, [own[number]] if number in (0, last) else [(0, SHARED), own[number]])
            for number, (_, length) in enumerate(spans)
        ],
    )


def _block_causal(sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> Problem:
    """Return block-causal sequences of blocks; ``starts`` holds the start of each row's sequence."""
    chunks = [length for sequence in sequences for length in sequence]
    ends = [start + length for start, length in _spans(chunks) for _ in range(length)]
    return Problem(
        layout=rk.ChunkLayout.from_lengths([list(sequence) for sequence in sequences]),
        mask=rk.ChunkMask.from_dense([torch.ones(len(s), len(s), dtype=torch.bool).tril() for s in sequences]),
        causal=False,
        prefix=[0] * len(ends),
        starts=starts,
        ends=ends,
        pieces=None,
    )


def _lengths(total: int, least: int, most: int, choice: random.Random) -> list[int]:
    """Return random lengths that add up to ``total``; the last may be shorter than ``least``."""
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        lengths.append(min(left, choice.randint(least, most)))
    return lengths


def _spans(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return the start and length of each consecutive piece."""
    return list(zip(itertools.accumulate(lengths, initial=0), lengths))
