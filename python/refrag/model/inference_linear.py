"""Linear layers on the CPU without gradients: torch's own weights, by whichever product is fastest for the rows."""

from __future__ import annotations

import functools

import torch
from torch import nn

from refrag_kernels import extension
from refrag_kernels.linear import cpu_linear_rows

# Up to 8 rows, such as a decode step's, torch's product takes 1.3 times as long as linear_rows, in float32 3 times.
_FEW_ROWS = 8
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (torch.Tensor, nn.Parameter)  # not quantised, sharded or traced


def use_inference_linears(model: nn.Module) -> int:
    """Let a model's linear layers take a faster product where there is one: on the CPU, without gradients.

    A few rows, such as those of a decode step, go to ``refrag_kernels.linear_rows``, which reads the weights with all
    threads. More rows in float32 go to oneDNN, as torch's compiler has it: nn.Linear asks MKL, which runs at half the
    rate or less on CPUs of another maker. Anything else is nn.Linear's own product: strided rows or weights, weights
    that are quantised or sharded, gradients, autocast, torch.compile.

    Layers stay nn.Linear, and what replaces them (adapters, ``quantize_dynamic``) finds them. Weights, names and state
    dict stay as they are. Layers of other kinds are left alone.

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
        if not is_inference_linear(layer):
            # Neither a closure nor a method, as in feed_forward: copies then refer to their own weights.
            layer.forward = functools.partial(_forward, layer)  # type: ignore[method-assign]
    return len(layers)


def is_inference_linear(layer: nn.Module) -> bool:
    """Whether ``use_inference_linears`` has changed a layer."""
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
    outputs, width = weight.shape
    if 0 < input.numel() <= _FEW_ROWS * width:
        return cpu_linear_rows(input.view(-1, width), weight, bias).view(*input.shape[:-1], outputs)
    if input.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return nn.Linear.forward(self, input)
