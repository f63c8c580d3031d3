"""Linear layers on the CPU without gradients: torch's own weights, by whichever product is fastest for the rows."""

from __future__ import annotations

import torch
from torch import nn

from refrag_kernels import extension
from refrag_kernels.cpu_kernels.linear import linear_rows

# Up to 8 rows, such as a decode step's, torch's product takes 1.3 times as long as linear_rows, in float32 3 times.
_FEW_ROWS = 8
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class InferenceLinear(nn.Linear):
    """nn.Linear that takes a faster product where there is one: on the CPU, without gradients.

    A few rows, such as those of a decode step, go to ``refrag_kernels.linear_rows``, which reads the weights with all
    threads. More rows in float32 go to oneDNN, as torch's compiler has it: nn.Linear asks MKL, which runs at half the
    rate or less on CPUs of another maker. Anything else is nn.Linear's own product.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if (
            input.device.type != "cpu"
            or input.dtype != self.weight.dtype
            or input.dtype not in _DTYPES
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(input)
        width = self.in_features
        if input.numel() <= _FEW_ROWS * width:
            out = linear_rows(input.reshape(-1, width), self.weight, self.bias)
            return out.view(*input.shape[:-1], self.out_features)
        if input.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
        return super().forward(input)


def use_inference_linears(model: nn.Module) -> int:
    """Let a model's linear layers take the faster products of ``InferenceLinear``.

    Weights, names and state dict stay as they are. Layers of other kinds (adapters, quantised weights) are left alone.

    Parameters
    ----------
    model : nn.Module
        Changed in place.

    Returns
    -------
    int
        The number of layers that were changed; 0 where the C++ kernels are missing.

    Examples
    --------
    >>> use_inference_linears(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
    2
    """
    if extension.cpu_missing() is not None:
        return 0
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear]
    for layer in layers:
        layer.__class__ = InferenceLinear
    return len(layers)
