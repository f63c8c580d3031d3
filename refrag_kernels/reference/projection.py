"""project_chunks and embed_mixed in plain torch: their specification, forward and backward.

All of a projection is computed in float32 (float64 for float64) and rounded once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F


def _gelu_slope(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_tanh_slope(x: torch.Tensor) -> torch.Tensor:
    root = math.sqrt(2 / math.pi)
    t = torch.tanh(root * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * root * (1 + 3 * 0.044715 * x * x)


def _silu_slope(x: torch.Tensor) -> torch.Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


# Each activation with its derivative.
ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {
    "gelu": (F.gelu, _gelu_slope),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh_slope),
    "silu": (F.silu, _silu_slope),
    "relu": (F.relu, lambda x: (x > 0).to(x.dtype)),
    "tanh": (torch.tanh, lambda x: 1 - torch.tanh(x) ** 2),
    "none": (lambda x: x, torch.ones_like),
}


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _wide(*tensors):
    """Return the tensors in the dtype to compute in; an absent one stays absent."""
    return [None if t is None else t.to(_compute_dtype(t)) for t in tensors]


def _project(chunks, w1, b1, w2, b2, activation):
    """Return the projection before it is rounded."""
    chunks, w1, b1, w2, b2 = _wide(chunks, w1, b1, w2, b2)
    return F.linear(ACTIVATIONS[activation][0](F.linear(chunks, w1, b1)), w2, b2)


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
    return _project(chunks, w1, b1, w2, b2, activation).to(chunks.dtype)


def project_chunks_backward(
    grad: torch.Tensor,
    chunks: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    activation: str,
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of chunks, w1, b1, w2, b2; an absent bias has an empty one."""
    dtype = chunks.dtype
    grad, chunks, w1, wide_b1, w2 = _wide(grad, chunks, w1, b1, w2)
    function, slope = ACTIVATIONS[activation]
    before = F.linear(chunks, w1, wide_b1)
    hidden = function(before)
    dbefore = (grad @ w2) * slope(before)
    gradients = (
        dbefore @ w1,
        dbefore.T @ chunks,
        dbefore.sum(0) if b1 is not None else dbefore.new_empty(0),
        grad.T @ hidden,
        grad.sum(0) if b2 is not None else grad.new_empty(0),
    )
    return tuple(gradient.to(dtype) for gradient in gradients)


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
    """See ``refrag_kernels.embed_mixed``."""
    text = slot_of_row < 0
    rows = token_table[token_ids.masked_fill(~text, 0)].to(_compute_dtype(token_table)) * token_scale
    if chunks.shape[0]:
        projected = _project(chunks, w1, b1, w2, b2, activation)
        rows = torch.where(text[:, None], rows, projected[slot_of_row.clamp(min=0).long()])
    return rows.to(token_table.dtype)


def embed_mixed_backward(
    grad: torch.Tensor,
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
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of token_table, chunks, w1, b1, w2, b2."""
    text = slot_of_row < 0
    wide = grad.to(_compute_dtype(grad))
    dtable = torch.zeros(token_table.shape, dtype=wide.dtype, device=grad.device)
    dtable.index_add_(0, token_ids.masked_fill(~text, 0), (wide * token_scale).masked_fill(~text[:, None], 0))
    # Text rows go to an extra row that is cut off.
    dprojected = torch.zeros(chunks.shape[0] + 1, grad.shape[1], dtype=wide.dtype, device=grad.device)
    dprojected.index_add_(0, slot_of_row.long().masked_fill(text, chunks.shape[0]), wide)
    gradients = project_chunks_backward(dprojected[:-1], chunks, w1, b1, w2, b2, activation)
    return dtable.to(token_table.dtype), *gradients
