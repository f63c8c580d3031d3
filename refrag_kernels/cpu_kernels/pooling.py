"""pool_chunks by the C++ kernels of csrc/cpu."""

from __future__ import annotations

import torch

from refrag_kernels import backends
from refrag_kernels.cpu_kernels.dtypes import no_float64

# Rows copied or scaled: torch is at the memory's speed already.
from refrag_kernels.reference.pooling import check_offsets, pool_chunks_backward

__all__ = ["pool_chunks", "pool_chunks_backward"]


@backends.requires(no_float64)
def pool_chunks(hidden: torch.Tensor, chunk_offsets: torch.Tensor, mode: str) -> torch.Tensor:
    """See ``refrag_kernels.pool_chunks``."""
    try:
        return torch.ops.refrag_cpu.pool_chunks(hidden, chunk_offsets.contiguous(), mode)
    except RuntimeError:
        check_offsets(hidden, chunk_offsets)
        raise
