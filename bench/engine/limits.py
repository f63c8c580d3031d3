"""What the machine can do: the rate of a large product of matrices, and of reading or copying memory."""

from __future__ import annotations

import functools

import torch

from bench.engine.timing import interleave

_SIDE = {"cpu": 2048, "cuda": 8192}  # a product that is large enough to run at the library's best rate
_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}  # more than the caches hold
BANDWIDTH = {"cpu": "read", "cuda": "copy"}  # what `bandwidth` measures


def matmul_flops(dtype: torch.dtype, rounds: int = 7, device: str = "cpu") -> float:
    """Return torch's rate for a large product, in FLOP/s."""
    side = _SIDE[device]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2.0 * side**3 / interleave({"matmul": lambda: a @ b}, rounds, device=device)["matmul"].median


def bandwidth(rounds: int = 7, device: str = "cpu") -> float:
    """Return the rate of reading memory on the CPU, of copying it on a GPU, in bytes read and written a second."""
    words = torch.ones(_BYTES[device] // 8, dtype=torch.int64, device=device)
    if device == "cpu":
        return words.nbytes / interleave({"sum": lambda: words.sum()}, rounds)["sum"].median
    copy = torch.empty_like(words)
    return 2 * words.nbytes / interleave({"copy": lambda: copy.copy_(words)}, rounds, device=device)["copy"].median


@functools.cache
def of_gpu(dtype: torch.dtype | None) -> float:
    """Return a GPU's rate of products of a dtype, or of copying: measured once, for other jobs don't change it."""
    return bandwidth(device="cuda") if dtype is None else matmul_flops(dtype, device="cuda")
