"""linear_rows in plain torch: its specification."""

from __future__ import annotations

import torch


def linear_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See ``refrag_kernels.linear_rows``."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = x.to(dtype) @ weight.to(dtype).T
    return (out if bias is None else out + bias.to(dtype)).to(x.dtype)
