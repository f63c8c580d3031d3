"""The gradients of merge_states by the C++ kernels of csrc/cpu; the other ops of the family are bound directly."""

from __future__ import annotations

import torch


def merge_states_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return all four gradients, computed in one pass."""
    return torch.ops.refrag_cpu.merge_states_backward.default(
        grad_out.contiguous(), grad_lse.contiguous(), out_a, lse_a, out_b, lse_b
    )
