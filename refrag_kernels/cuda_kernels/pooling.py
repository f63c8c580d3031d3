"""Chunk pooling on CUDA."""

from __future__ import annotations

import torch

from refrag_kernels import backends


def _unsupported(hidden: torch.Tensor, chunk_offsets: torch.Tensor, mode: str) -> str | None:
    return "dtype float64" if hidden.dtype == torch.float64 else None


@backends.requires(_unsupported)
def pool_chunks(hidden: torch.Tensor, chunk_offsets: torch.Tensor, mode: str) -> torch.Tensor:
    return torch.ops.refrag_cuda.pool_chunks(hidden, chunk_offsets, mode)
