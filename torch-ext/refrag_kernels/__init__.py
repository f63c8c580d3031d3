"""CUDA kernels for compressed retrieval-augmented decoding (REFRAG): paged attention, pooling, projection, assembly.

The ops of the library ``refrag_kernels`` that need neither a plan nor a gradient, for inference. Shapes, meaning and
errors are those of its documentation; each kernel checks its indices and drops what leaves a tensor.
"""

from __future__ import annotations  # the Hub takes Python 3.9

import torch
import torch.nn.functional as F

from ._ops import add_op_namespace_prefix, ops

_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "none": lambda x: x,
}
_SKINNY = 64  # chunks, up to which one kernel reads each weight once; torch's products are faster for more


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lengths: torch.Tensor,
    *,
    q_offsets: torch.Tensor | None = None,
    visible: tuple[torch.Tensor, torch.Tensor] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the last rows of each sequence to its paged keys, in bfloat16 or float16.

    q [T_q, H_q, D], pages [P, page, H_kv, D], page_table int32 [B, max_pages], kv_lengths int32 [B]; D 64, 96 or 128.
    ``q_offsets`` int32 [B + 1]: the rows of each sequence, causal; None: one row a sequence. ``visible``: int32 indptr
    [T_q + 1] and ranges [R, 2] of the keys that each row sees. Returns out [T_q, H_q, D] and lse [T_q, H_q] float32.
    """
    if window is not None and window < 1:
        raise ValueError(f"window: got {window}, needs at least 1")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: got {softcap}, needs a positive number or None")
    indptr, ranges = (None, None) if visible is None else visible
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    left = -1 if window is None else window - 1
    return ops.paged_attention(
        q, k_pages, v_pages, page_table, kv_lengths, q_offsets, indptr, ranges, scale, softcap or 0.0, left, 0, sinks
    )


def append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lengths: torch.Tensor,
    q_offsets: torch.Tensor,
) -> None:
    """Write new rows k, v [T, H_kv, D], the last ones of each sequence, into their pages, in place."""
    ops.append_kv(k, v, k_pages, v_pages, page_table, kv_lengths, q_offsets)


def merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention [T, H, D] and lse [T, H] over two disjoint sets of keys, exactly."""
    return ops.merge_states(*(tensor.contiguous() for tensor in (out_a, lse_a, out_b, lse_b)))


def pool_chunks(hidden: torch.Tensor, chunk_offsets: torch.Tensor, mode: str = "mean") -> torch.Tensor:
    """Pool the rows of each chunk, hidden [T, d] and offsets int32 [C + 1] -> [C, d]; "mean", "first" or "last"."""
    return ops.pool_chunks(hidden, chunk_offsets, mode)


def project_chunks(
    chunks: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    *,
    activation: str = "gelu",
) -> torch.Tensor:
    """Project chunk embeddings [N, d_enc] by two linear layers, w1 [h, d_enc], w2 [d_dec, h] -> [N, d_dec]."""
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, needs one of {', '.join(_ACTIVATIONS)}")
    half = chunks.dtype in (torch.float16, torch.bfloat16)
    if half and chunks.shape[0] <= _SKINNY and w1.shape[0] % 8 == 0 and w1.shape[1] % 8 == 0:
        return ops.project_chunks(chunks, w1, b1, w2, b2, activation, None)
    return F.linear(_ACTIVATIONS[activation](F.linear(chunks, w1, b1)), w2, b2)


def embed_mixed(
    token_ids: torch.Tensor,
    token_table: torch.Tensor,
    chunks: torch.Tensor,
    slot_of_row: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    *,
    activation: str = "gelu",
    token_scale: float = 1.0,
) -> torch.Tensor:
    """Make a mixed sequence [T, d_dec]: rows of the token table, and of the projected chunks where they have a slot.

    token_ids int64 [T]; slot_of_row int32 [T]: -1 for text, else a row of ``chunks``.
    """
    projected = project_chunks(chunks, w1, b1, w2, b2, activation=activation)
    return ops.assemble_mixed(token_ids, token_table, projected, slot_of_row, token_scale)


@torch.library.register_fake(add_op_namespace_prefix("paged_attention"))
def _(q, *_):
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.register_fake(add_op_namespace_prefix("append_kv"))
def _(*_):
    return None


@torch.library.register_fake(add_op_namespace_prefix("merge_states"))
def _(out_a, lse_a, out_b, lse_b):
    return torch.empty_like(out_a), torch.empty_like(lse_a)


@torch.library.register_fake(add_op_namespace_prefix("pool_chunks"))
def _(hidden, chunk_offsets, mode):
    return hidden.new_empty(chunk_offsets.shape[0] - 1, hidden.shape[1])


@torch.library.register_fake(add_op_namespace_prefix("project_chunks"))
def _(chunks, w1, b1, w2, b2, activation, packed):
    return chunks.new_empty(chunks.shape[0], w2.shape[0])


@torch.library.register_fake(add_op_namespace_prefix("assemble_mixed"))
def _(token_ids, token_table, projected, slot_of_row, token_scale):
    return token_table.new_empty(token_ids.shape[0], token_table.shape[1])


__all__ = ["append_kv", "embed_mixed", "merge_states", "paged_attention", "pool_chunks", "project_chunks"]
