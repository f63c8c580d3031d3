"""The scale of a decoder's token embeddings."""

from __future__ import annotations

import functools

import torch
from torch import nn


def token_scale_of(table: nn.Module) -> float:
    """Return the factor by which a decoder scales its token embeddings, without a read from the device."""
    scale = getattr(table, "embed_scale", None)
    if isinstance(scale, torch.Tensor):  # Gemma, which also has the value on the host
        return _rounded(float(getattr(table, "scalar_embed_scale", scale)), table.weight.dtype)  # type: ignore[arg-type]
    return 1.0 if scale is None else float(scale)


@functools.cache
def _rounded(number: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(number, dtype=torch.float32, device="cpu").to(dtype))
