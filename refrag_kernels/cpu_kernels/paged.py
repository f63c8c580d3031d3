"""paged_attention, append_kv and merge_states by the C++ kernels.

The C++ checks values before any work, but its errors reach Python as RuntimeError; ``paged_values`` then finds the
argument to blame. So a good call pays for no second check.
"""

from __future__ import annotations

import torch

from refrag_kernels import paged_values
from refrag_kernels.backends import requires


def _float64(tensor: torch.Tensor) -> str | None:
    return "dtype float64" if tensor.dtype == torch.float64 else None


@requires(lambda q, *_, **__: _float64(q))
def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lengths: torch.Tensor,
    q_offsets: torch.Tensor | None,
    visible_indptr: torch.Tensor | None,
    visible_ranges: torch.Tensor | None,
    scale: float,
    softcap: float,
    window_left: int,
    window_right: int,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read keys and values once for all query heads of their group; see csrc/cpu/paged.cpp."""
    try:
        return torch.ops.refrag_cpu.paged_attention.default(
            q, k_pages, v_pages, page_table, kv_lengths, q_offsets, visible_indptr, visible_ranges,
            scale, softcap, window_left, window_right, sinks,
        )  # fmt: skip
    except RuntimeError:
        paged_values.check_attention(q, k_pages, page_table, kv_lengths, q_offsets, visible_indptr, visible_ranges)
        raise


@requires(lambda k, *_, **__: _float64(k))
def append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lengths: torch.Tensor,
    q_offsets: torch.Tensor,
) -> None:
    """Copy each row to its place."""
    try:
        torch.ops.refrag_cpu.append_kv.default(k, v, k_pages, v_pages, page_table, kv_lengths, q_offsets)
    except RuntimeError:
        paged_values.check_append(k, k_pages, page_table, kv_lengths, q_offsets)
        raise


@requires(lambda out_a, *_, **__: _float64(out_a))
def merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weigh and add in one pass."""
    return torch.ops.refrag_cpu.merge_states.default(out_a, lse_a, out_b, lse_b)


@requires(lambda grad_out, *_, **__: _float64(grad_out))
def merge_states_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """All four gradients in one pass."""
    return torch.ops.refrag_cpu.merge_states_backward.default(
        grad_out.contiguous(), grad_lse.contiguous(), out_a, lse_a, out_b, lse_b
    )
