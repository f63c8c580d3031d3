"""pool_chunks by the CUDA kernels of csrc/cuda."""

from __future__ import annotations

import torch


def pool_chunks(hidden: torch.Tensor, chunk_offsets: torch.Tensor, mode: str) -> torch.Tensor:
    """See ``refrag_kernels.pool_chunks``; a chunk whose rows are not within ``hidden`` gives zeros."""
    return torch.ops.refrag_cuda.pool_chunks(hidden, chunk_offsets.contiguous(), mode)
