"""pool_chunks by the C++ kernels of csrc/cpu."""

from __future__ import annotations

import torch


def pool_chunks(hidden: torch.Tensor, chunk_offsets: torch.Tensor, mode: str) -> torch.Tensor:
    """See ``refrag_kernels.pool_chunks``."""
    return torch.ops.refrag_cpu.pool_chunks.default(hidden, chunk_offsets.contiguous(), mode)
