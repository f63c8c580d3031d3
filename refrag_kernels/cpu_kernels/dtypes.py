"""Which dtypes the C++ kernels take."""

from __future__ import annotations

import torch


def no_float64(first: torch.Tensor, *_: object, **__: object) -> str | None:
    """Refuse float64 tensors, for ``backends.requires``."""
    return "dtype float64" if first.dtype == torch.float64 else None
