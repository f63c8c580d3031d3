"""Measure the machine's limits: the throughput of a large matmul, and the bandwidth of reading or copying memory."""

from __future__ import annotations

import functools

import torch

from bench.engine.timing import interleave

_SIDE = {"cpu": 2048, "cuda": 8192}  # large enough for the library's peak throughput
_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}  # larger than the caches
BANDWIDTH = {"cpu": "read", "cuda": "copy"}  # what `bandwidth` measures


def matmul_flops(dtype: torch.dtype, rounds: int = 7, device: str = "cpu") -> float:
    """Return torch's throughput for a large matmul, in FLOP/s."""
    side = _SIDE[device]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2.0 * side**3 / interleave({"matmul": lambda: a @ b}, rounds, device=device)["matmul"].median


def bandwidth(rounds: int = 7, device: str = "cpu") -> float:
    """Return the bandwidth of reading memory on the CPU, or of copying it on a GPU (reads plus writes), in bytes/s."""
    words = torch.ones(_BYTES[device] // 8, dtype=torch.int64, device=device)
    if device == "cpu":
        return words.nbytes / interleave({"sum": lambda: words.sum()}, rounds)["sum"].median
    copy = torch.empty_like(words)
    return 2 * words.nbytes / interleave({"copy": lambda: copy.copy_(words)}, rounds, device=device)["copy"].median


@functools.cache
def of_gpu(dtype: torch.dtype | None) -> float:
    """Return a GPU's matmul throughput in a dtype, or its copy bandwidth. Cached: no other jobs share the GPU."""
    return bandwidth(device="cuda") if dtype is None else matmul_flops(dtype, device="cuda")
