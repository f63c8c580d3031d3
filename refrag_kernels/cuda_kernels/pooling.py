"""pool_chunks by the CUDA kernels of csrc/cuda."""

from __future__ import annotations

import torch

from refrag_kernels import backends
from refrag_kernels.cuda_kernels.support import no_float64

# The gradient spreads rows: torch is at the memory's speed already.
from refrag_kernels.reference.pooling import check_offsets, pool_chunks_backward
from refrag_kernels.validation import values_are_checked

__all__ = ["pool_chunks", "pool_chunks_backward"]


@backends.requires(no_float64)
def pool_chunks(hidden: torch.Tensor, chunk_offsets: torch.Tensor, mode: str) -> torch.Tensor:
    """See ``refrag_kernels.pool_chunks``; a chunk whose rows are not within ``hidden`` gives zeros."""
    if values_are_checked():
        check_offsets(hidden, chunk_offsets.cpu())
    return torch.ops.refrag_cuda.pool_chunks(hidden, chunk_offsets.contiguous(), mode)
