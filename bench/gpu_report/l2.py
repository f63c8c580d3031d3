"""Measure a GPU's L2 read bandwidth: every program reads the same buffer, from a different start."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

_WORDS = 4096  # float32 words per load of a program


@triton.jit
def read_kernel(buffer, sums, blocks, BLOCK: tl.constexpr):
    first = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(blocks):
        o_word = (first + step) % blocks * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(buffer + o_word)
    tl.store(sums + first, tl.sum(total, 0))


def reader(size: int, programs: int, device: str) -> tuple[Callable[[], torch.Tensor], torch.Tensor, int]:
    """Return a call that gives each program's sum, the expected sums, and the total bytes read."""
    blocks = size // (4 * _WORDS)
    # Sums of small integers are exact in any order.
    buffer = torch.arange(blocks * _WORDS, device=device).remainder_(3).to(torch.float32)
    sums = torch.empty(programs, device=device)

    def call() -> torch.Tensor:
        read_kernel[(programs,)](buffer, sums, blocks, BLOCK=_WORDS, num_warps=8)
        return sums

    return call, buffer.sum(dtype=torch.float64).float().expand(programs), programs * buffer.nbytes
