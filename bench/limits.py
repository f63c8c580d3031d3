"""What the machine can do: the rate of a large product of matrices, and of reading memory."""

from __future__ import annotations

import torch

from bench.timing import interleave

_SIDE = 2048  # a product that is large enough to run at the library's best rate
_READ = 1 << 28  # bytes, more than the caches hold


def matmul_flops(dtype: torch.dtype, rounds: int = 7) -> float:
    """Return torch's rate for a large product, in FLOP/s."""
    a, b = (torch.randn(_SIDE, _SIDE).to(dtype) for _ in range(2))
    return 2.0 * _SIDE**3 / interleave({"matmul": lambda: a @ b}, rounds)["matmul"].median


def read_bytes(rounds: int = 7) -> float:
    """Return the rate of reading memory, in bytes/s."""
    words = torch.ones(_READ // 8, dtype=torch.int64)
    return _READ / interleave({"sum": lambda: words.sum()}, rounds)["sum"].median
