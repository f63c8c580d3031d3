"""project_chunks and embed_mixed by the CUDA kernels of csrc/cuda.

Up to 64 chunks go through a kernel that reads each weight once; more are a matter for torch's own products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from refrag_kernels import backends
from refrag_kernels.cuda_kernels.support import no_tensor_cores, unaligned
from refrag_kernels.reference.projection import ACTIVATIONS, check_indices
from refrag_kernels.validation import values_are_checked

MAX_SKINNY_CHUNKS = 64


def _torch_multiplies(dtype: torch.dtype) -> str | None:
    """Return why torch's own products of a dtype are not what the ops promise, or None."""
    if dtype == torch.float64:
        return "dtype float64"
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "torch multiplies float32 in a single pass of TF32 (torch.set_float32_matmul_precision)"
    return None


def _not_skinny(
    chunks: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    activation: str,
    packed: torch.Tensor | None,
) -> str | None:
    """Return why the kernel of csrc/cuda does not take these arguments, or None."""
    if chunks.shape[0] > MAX_SKINNY_CHUNKS:
        return f"{chunks.shape[0]} chunks"
    if w1.shape[0] % 8 or w1.shape[1] % 8:
        return f"a projection of width {w1.shape[1]} and {w1.shape[0]}"
    return no_tensor_cores(chunks) or unaligned(chunks=chunks, w1=w1, w2=w2)


def _unsupported(chunks: torch.Tensor, *_: object, **__: object) -> str | None:
    return _torch_multiplies(chunks.dtype)


@backends.requires(_unsupported)
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
    if _not_skinny(chunks, w1, b1, w2, b2, activation, packed):
        return F.linear(ACTIVATIONS[activation][0](F.linear(chunks, w1, b1)), w2, b2)
    b1, b2 = (None if bias is None else bias.contiguous() for bias in (b1, b2))
    return torch.ops.refrag_cuda.project_chunks.default(chunks, w1, b1, w2, b2, activation, packed)


def _embed_unsupported(token_ids: torch.Tensor, token_table: torch.Tensor, *_: object, **__: object) -> str | None:
    return _torch_multiplies(token_table.dtype)


@backends.requires(_embed_unsupported)
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
    """See ``refrag_kernels.embed_mixed``; a row whose token or slot does not exist gives zeros."""
    if values_are_checked():
        check_indices(token_ids.cpu(), token_table, chunks, slot_of_row.cpu())
    projected = project_chunks(chunks, w1, b1, w2, b2, activation, packed)
    return torch.ops.refrag_cuda.assemble_mixed.default(
        token_ids.contiguous(), token_table, projected, slot_of_row.contiguous(), token_scale
    )
