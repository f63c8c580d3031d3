"""mixed_attention by the CUDA kernels of csrc/cuda; other backends compute its gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from refrag_kernels import grid_order


def mixed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Sequence[torch.Tensor],
    scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``refrag_kernels.mixed_attention``; returns (out, lse)."""
    if sinks is not None:
        sinks = sinks.contiguous()
    return torch.ops.refrag_cuda.mixed_attention(q, k, v, list(plan), scale, softcap, sinks, *grid_order.order_of(k))
