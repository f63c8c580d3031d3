"""Linear layers with a frozen weight in its own dtype and a trained low-rank update in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from refrag.adapters import LORA_SCALE

SCALE = float(LORA_SCALE)


class LowRankLinear(nn.Module):
    """``x W^T + 2 x A^T B^T`` with a frozen W; the update starts at zero.

    peft computes the same, but scales and adds the update in separate passes over the outputs. Here both are fused into
    the second matrix product, forward and backward, because such passes dominate the step of a small decoder.

    Parameters
    ----------
    linear : nn.Linear
        The layer to adapt; its weight is shared, not copied.
    rank : int
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.weight = linear.weight.requires_grad_(False)
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        nn.init.uniform_(self.lora_A, -1 / math.sqrt(linear.in_features), 1 / math.sqrt(linear.in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = _LowRankProduct.apply(x, self.weight, self.lora_A, self.lora_B)
        return out if self.bias is None else out + self.bias


class _LowRankProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, lora_a: Any, lora_b: Any) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        inner = rows @ a.t()
        out = rows @ weight.t()
        out.addmm_(inner, b.t(), alpha=SCALE)
        ctx.save_for_backward(rows, weight, a, b, inner)
        ctx.shape = x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        rows, weight, a, b, inner = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        grad_inner = grad @ b  # the products below apply SCALE
        grad_b = (grad.t() @ inner).float().mul_(SCALE)
        grad_a = (grad_inner.t() @ rows).float().mul_(SCALE)
        grad_rows = None
        if ctx.needs_input_grad[0]:
            grad_rows = grad @ weight
            grad_rows = grad_rows.addmm_(grad_inner, a, alpha=SCALE).view(ctx.shape)
        return grad_rows, None, grad_a, grad_b


def add_low_rank(part: nn.Module, rank: int, names: Sequence[str]) -> int:
    """Replace the linear layers of a module that are called one of ``names``.

    Returns
    -------
    int
        Number of layers replaced.
    """
    count = 0
    for module in list(part.modules()):
        for name, child in list(module.named_children()):
            if name in names and isinstance(child, nn.Linear):
                setattr(module, name, LowRankLinear(child, rank))
                count += 1
    return count


def update_names(name: str) -> str:
    """Return a parameter's name in the adapter's file: ``q_proj.lora_A`` becomes ``q_proj.lora_A.weight``."""
    return f"{name}.weight" if name.endswith((".lora_A", ".lora_B")) else name
