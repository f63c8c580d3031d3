"""project_chunks and embed_mixed by the C++ kernels of csrc/cpu."""

from __future__ import annotations

import torch

from refrag_kernels import backends
from refrag_kernels.cpu_kernels.dtypes import no_float64

# Five products of large matrices: torch's own are as fast as any.
from refrag_kernels.reference.projection import check_indices, embed_mixed_backward, project_chunks_backward

__all__ = ["embed_mixed", "embed_mixed_backward", "project_chunks", "project_chunks_backward"]


@backends.requires(no_float64)
def project_chunks(
    chunks: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    activation: str,
    packed: torch.Tensor | None,
) -> torch.Tensor:
    """See ``refrag_kernels.project_chunks``."""
    return torch.ops.refrag_cpu.project_chunks(chunks, w1, b1, w2, b2, activation, packed)


def _table_float64(token_ids: torch.Tensor, token_table: torch.Tensor, *_: object) -> str | None:
    return no_float64(token_table)


@backends.requires(_table_float64)
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
    try:
        return torch.ops.refrag_cpu.embed_mixed(
            token_ids, token_table, chunks, slot_of_row, w1, b1, w2, b2, activation, token_scale, packed
        )
    except RuntimeError:
        # The kernels only find that an index is bad; this says which one and what it needs.
        check_indices(token_ids, token_table, chunks, slot_of_row)
        raise
