"""linear_rows by the C++ kernels of csrc/cpu."""

from __future__ import annotations

import torch

from refrag_kernels import backends
from refrag_kernels.cpu_kernels.dtypes import no_float64


@backends.requires(no_float64)
def linear_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See ``refrag_kernels.linear_rows``."""
    return torch.ops.refrag_cpu.linear_rows(x, weight, bias)
