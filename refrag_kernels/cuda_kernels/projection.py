"""project_chunks and embed_mixed by the CUDA kernels of csrc/cuda.

Up to 64 chunks use a kernel that reads each weight once; more use torch's own matrix products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from refrag_kernels.reference.projection import ACTIVATIONS
from refrag_kernels.support import HALF, TENSOR_CORES, too_old, unaligned

MAX_SMALL_M = 64


def _not_small_m(
    chunks: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    activation: str,
    packed: torch.Tensor | None,
) -> str | None:
    """Return why the kernel of csrc/cuda does not support these arguments, or None."""
    if chunks.shape[0] > MAX_SMALL_M:
        return f"{chunks.shape[0]} chunks"
    if w1.shape[0] % 8 or w1.shape[1] % 8:
        return f"a projection of hidden sizes {w1.shape[1]} and {w1.shape[0]}"
    if chunks.dtype not in HALF:
        return f"dtype {str(chunks.dtype).removeprefix('torch.')}"
    return too_old(chunks.device, TENSOR_CORES) or unaligned(chunks=chunks, w1=w1, w2=w2)


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
    if _not_small_m(chunks, w1, b1, w2, b2, activation, packed):
        return F.linear(ACTIVATIONS[activation][0](F.linear(chunks, w1, b1)), w2, b2)
    b1, b2 = (None if bias is None else bias.contiguous() for bias in (b1, b2))
    return torch.ops.refrag_cuda.project_chunks.default(chunks, w1, b1, w2, b2, activation, packed)


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
    """See ``refrag_kernels.embed_mixed``; a row whose token or slot is out of range becomes zeros."""
    projected = project_chunks(chunks, w1, b1, w2, b2, activation, packed)
    return torch.ops.refrag_cuda.assemble_mixed.default(
        token_ids.contiguous(), token_table, projected, slot_of_row.contiguous(), token_scale
    )
