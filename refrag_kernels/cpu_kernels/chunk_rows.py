"""select_chunk_rows by the C++ kernels of csrc/cpu."""

from __future__ import annotations

import torch


def select_chunk_rows(
    k: torch.Tensor,
    v: torch.Tensor,
    chunk_offsets: torch.Tensor,
    kept_offsets: torch.Tensor,
    num_kept: int,
    scores: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``refrag_kernels.select_chunk_rows``."""
    offsets = chunk_offsets.contiguous(), kept_offsets.contiguous()
    return torch.ops.refrag_cpu.select_chunk_rows.default(k, v, *offsets, num_kept, scores, cos, sin)
