"""paged_attention, append_kv and merge_states by the CUDA kernels of csrc/cuda.

The kernels check each index against the sizes of the tables. A bad one counts as a key that no row attends to, or as a
row to drop; with REFRAG_KERNELS_CHECK=1 it raises instead.
"""

from __future__ import annotations

from typing import TypeVar

import torch

_Tensor = TypeVar("_Tensor", torch.Tensor, torch.Tensor | None)


def _contiguous(tensor: _Tensor) -> _Tensor:
    return None if tensor is None else tensor.contiguous()


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
    """See ``refrag_kernels.paged_attention``; returns (out, lse)."""
    return torch.ops.refrag_cuda.paged_attention.default(
        q, k_pages, v_pages, page_table, kv_lengths.contiguous(), _contiguous(q_offsets),
        _contiguous(visible_indptr), _contiguous(visible_ranges), scale, softcap, window_left, window_right,
        _contiguous(sinks),
    )  # fmt: skip


def append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lengths: torch.Tensor,
    q_offsets: torch.Tensor,
) -> None:
    """See ``refrag_kernels.append_kv``."""
    kv_lengths, q_offsets = kv_lengths.contiguous(), q_offsets.contiguous()
    torch.ops.refrag_cuda.append_kv.default(k, v, k_pages, v_pages, page_table, kv_lengths, q_offsets)


def merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``refrag_kernels.merge_states``."""
    return torch.ops.refrag_cuda.merge_states.default(
        out_a.contiguous(), lse_a.contiguous(), out_b.contiguous(), lse_b.contiguous()
    )
