"""mixed_attention by the C++ kernels of csrc/cpu."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from refrag_kernels import backends


def _no_float64(first: torch.Tensor, *_: object, **__: object) -> str | None:
    return f"dtype {str(first.dtype).removeprefix('torch.')}" if first.dtype == torch.float64 else None


@backends.requires(_no_float64)
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
    return torch.ops.refrag_cpu.mixed_attention(q, k, v, list(plan), scale, softcap, sinks)


@backends.requires(_no_float64)
def mixed_attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: Sequence[torch.Tensor],
    scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k, v and the sinks."""
    return torch.ops.refrag_cpu.mixed_attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, list(plan), scale, softcap, sinks
    )
