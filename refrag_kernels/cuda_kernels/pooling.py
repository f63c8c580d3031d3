"""pool_chunks by the CUDA kernels of csrc/cuda."""

from __future__ import annotations

import torch

from refrag_kernels import backends

# The gradient spreads rows: torch is at the memory's speed already.
from refrag_kernels.reference.pooling import check_offsets, pool_chunks_backward
from refrag_kernels.validation import values_are_checked

__all__ = ["pool_chunks", "pool_chunks_backward"]


def _unsupported(hidden: torch.Tensor, chunk_offsets: torch.Tensor, mode: str) -> str | None:
    return "dtype float64" if hidden.dtype == torch.float64 else None


@backends.requires(_unsupported)
def pool_chunks(hidden: torch.Tensor, chunk_offsets: torch.Tensor, mode: str) -> torch.Tensor:
    """See ``refrag_kernels.pool_chunks``; a chunk whose rows are not within ``hidden`` gives zeros."""
    if values_are_checked():
        check_offsets(hidden, chunk_offsets.cpu())
    return torch.ops.refrag_cuda.pool_chunks(hidden, chunk_offsets.contiguous(), mode)
