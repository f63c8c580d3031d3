"""embed_mixed by the C++ kernels of csrc/cpu; project_chunks is bound directly."""

from __future__ import annotations

import torch


def embed_mixed(
    token_ids: torch.Tensor,
    token_table: torch.Tensor,
    chunks: torch.Tensor,
    slot_of_row: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    activation: str,
    token_scale: float,
    packed: torch.Tensor | None,
) -> torch.Tensor:
    """See ``refrag_kernels.embed_mixed``."""
    token_ids, slot_of_row = token_ids.contiguous(), slot_of_row.contiguous()
    return torch.ops.refrag_cpu.embed_mixed.default(
        token_ids, token_table, chunks, slot_of_row, w1, b1, w2, b2, activation, token_scale, packed
    )
