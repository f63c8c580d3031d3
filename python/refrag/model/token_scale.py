"""What a decoder multiplies its token embeddings by."""

from __future__ import annotations

import functools

import torch
from torch import nn


def token_scale_of(table: nn.Module) -> float:
    """Return what a decoder's embedding multiplies its rows by, without reading from the device."""
    scale = getattr(table, "embed_scale", None)
    if isinstance(scale, torch.Tensor):  # Gemma's, whose number is on the host too
        return _rounded(float(getattr(table, "scalar_embed_scale", scale)), table.weight.dtype)  # type: ignore[arg-type]
    return 1.0 if scale is None else float(scale)


@functools.cache
def _rounded(number: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(number, dtype=torch.float32, device="cpu").to(dtype))
