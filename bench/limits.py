"""What the machine can do: the rate of a large product of matrices, and of reading memory."""

from __future__ import annotations

import torch

from bench.timing import interleave

_SIDE = {"cpu": 2048, "cuda": 8192}  # a product that is large enough to run at the library's best rate
_READ = {"cpu": 1 << 28, "cuda": 1 << 31}  # bytes, more than the caches hold


def matmul_flops(dtype: torch.dtype, rounds: int = 7, device: str = "cpu") -> float:
    """Return torch's rate for a large product, in FLOP/s."""
    side = _SIDE[device]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2.0 * side**3 / interleave({"matmul": lambda: a @ b}, rounds)["matmul"].median


def read_bytes(rounds: int = 7, device: str = "cpu") -> float:
    """Return the rate of reading memory, in bytes/s."""
    words = torch.ones(_READ[device] // 8, dtype=torch.int64, device=device)
    return _READ[device] / interleave({"sum": lambda: words.sum()}, rounds)["sum"].median
