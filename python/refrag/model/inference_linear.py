"""Linear layers for CPU inference: picks the fastest matrix product for the number of rows, with torch's weights."""

from __future__ import annotations

import functools

import torch
from torch import nn

from refrag_kernels import extension
from refrag_kernels.linear import cpu_linear_rows

# For up to 8 rows (a decode step), torch's product takes 1.3 times as long as linear_rows, and 3 times in float32.
_FEW_ROWS = 8
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (torch.Tensor, nn.Parameter)  # rules out quantised, sharded and traced tensors


def use_inference_linears(model: nn.Module) -> int:
    """Make a model's linear layers use faster matrix products for inference on the CPU.

    A few rows, such as those of a decode step, are computed by ``refrag_kernels.linear_rows``, which reads the weights
    with all threads. More rows in float32 are computed by oneDNN, as under torch.compile, because nn.Linear calls MKL,
    which runs at half the rate or less on non-Intel CPUs. nn.Linear's own product handles everything else: strided rows
    or weights, quantised or sharded weights, gradients, autocast, torch.compile.

    Layers remain nn.Linear, so that adapters and ``quantize_dynamic`` still find and replace them. Weights, names and
    the state dict don't change, nor do layers of other types.

    Parameters
    ----------
    model : nn.Module
        Changed in place.

    Returns
    -------
    int
        Number of linear layers changed; 0 if the C++ kernels are missing.

    Examples
    --------
    >>> use_inference_linears(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
    2
    """
    if extension.cpu_missing() is not None:
        return 0
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear]
    for layer in layers:
        if not is_inference_linear(layer):
            # A partial, as in feed_forward: a copied layer then uses its own weights.
            layer.forward = functools.partial(_forward, layer)  # type: ignore[method-assign]
    return len(layers)


def is_inference_linear(layer: nn.Module) -> bool:
    """Return whether ``use_inference_linears`` has changed a layer."""
    return getattr(layer.__dict__.get("forward"), "func", None) is _forward


def _forward(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    weight, bias = self.weight, self.bias
    if (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or type(input) not in _PLAIN
        or type(weight) not in _PLAIN
        or not (input.is_cpu and weight.is_cpu)
        or input.dtype != weight.dtype
        or input.dtype not in _DTYPES
        or input.shape[-1:] != weight.shape[1:]
        or not (input.is_contiguous() and weight.is_contiguous())
        or torch.is_autocast_enabled("cpu")
        or not (bias is None or (type(bias) in _PLAIN and bias.dtype == weight.dtype and bias.is_contiguous()))
    ):
        return nn.Linear.forward(self, input)
    outputs, inputs = weight.shape
    if 0 < input.numel() <= _FEW_ROWS * inputs:
        return cpu_linear_rows(input.view(-1, inputs), weight, bias).view(*input.shape[:-1], outputs)
    if input.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return nn.Linear.forward(self, input)
