"""mixed_attention by the C++ kernels of csrc/cpu."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from refrag_kernels import backends


def _no_float64(q: torch.Tensor, *_: object, **__: object) -> str | None:
    return f"dtype {str(q.dtype).removeprefix('torch.')}" if q.dtype == torch.float64 else None


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
