"""Inputs of the cases: prompts of text and slots, and passages that attend to themselves."""

from __future__ import annotations

import dataclasses

import torch

import refrag_kernels as rk
from bench.engine.case import Skip

SHARED = 64  # rows of the prefix, and of the question


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prefix, a context in chunks of k tokens with some left as text, a question; causal, as in the paper."""

    context: int
    k: int
    expand: float

    def __post_init__(self) -> None:
        if self.chunks < 1:
            raise Skip(
                f"a context of {self.context} is too short for {2 * SHARED} rows of text and a chunk of {self.k}"
            )

    @property
    def chunks(self) -> int:
        return (self.context - 2 * SHARED) // self.k

    def expanded(self) -> list[bool]:
        """Return which chunks are left as text; they are evenly spaced."""
        n = self.chunks
        count = round(self.expand * n)
        return [(i + 1) * count // n > i * count // n for i in range(n)]

    def layout(self) -> rk.ChunkLayout:
        return rk.ChunkLayout.from_lengths([[SHARED, *(self.k if text else 1 for text in self.expanded()), SHARED]])


@dataclasses.dataclass(frozen=True)
class Passages:
    """A prefix, passages that attend to it and themselves, a question that attends to everything; not causal.

    The passage length makes ``density`` the fraction of allowed pairs, rounded to whole chunks of ``k`` rows.
    """

    rows: int
    k: int
    density: float

    @property
    def passage(self) -> int:
        body = self.rows - 2 * SHARED
        allowed = self.density * self.rows**2 - SHARED**2 - SHARED * self.rows
        length = round((allowed / body - SHARED) / self.k) * self.k if body >= self.k else 0
        if length < self.k:
            raise Skip(f"density {self.density:g} of {self.rows} rows leaves less than a chunk of {self.k} per passage")
        return min(length, body)

    def spans(self) -> list[int]:
        """Return the lengths of the prefix, the passages and the question."""
        body = self.rows - 2 * SHARED
        whole, rest = divmod(body, self.passage)
        return [SHARED, *[self.passage] * whole, *([rest] if rest else []), SHARED]

    def chunks(self) -> tuple[list[int], list[int]]:
        """Return the length and the span of each chunk."""
        lengths, span_of_chunk = [], []
        spans = self.spans()
        for number, span in enumerate(spans):
            step = span if number in (0, len(spans) - 1) else self.k
            for start in range(0, span, step):
                lengths.append(min(step, span - start))
                span_of_chunk.append(number)
        return lengths, span_of_chunk

    def layout(self) -> rk.ChunkLayout:
        return rk.ChunkLayout.from_lengths([self.chunks()[0]])

    def chunk_mask(self) -> torch.Tensor:
        span = torch.tensor(self.chunks()[1])
        mask = span[:, None] == span
        mask[:, 0] = mask[-1] = True
        return mask

    def dense(self) -> torch.Tensor:
        lengths = torch.tensor(self.chunks()[0])
        return self.chunk_mask().repeat_interleave(lengths, 0).repeat_interleave(lengths, 1)

    def plan(self, device: str = "cpu") -> rk.AttentionPlan:
        return rk.plan_attention(self.layout(), rk.ChunkMask.from_dense(self.chunk_mask()), causal=False, device=device)

    def span_of_row(self) -> tuple[torch.Tensor, int]:
        """Return the span of each row, and the index of the question's span."""
        lengths = torch.tensor(self.spans())
        return torch.arange(len(lengths)).repeat_interleave(lengths), len(lengths) - 1
