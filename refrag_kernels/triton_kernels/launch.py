"""Properties of a launch: the device, its architecture, and the tile shapes that kernels are specialized for."""

from __future__ import annotations

import contextlib
import functools

import torch

from refrag_kernels import architectures


@functools.cache
def _architecture(index: int) -> str:
    if torch.version.hip is not None:
        return "gfx942"
    return architectures.of_capability(*torch.cuda.get_device_capability(index))


def architecture(device: torch.device) -> str:
    """Return the name in ``architectures.TRITON`` whose configurations ``device`` uses."""
    if device.type != "cuda":  # the interpreter runs kernels on tensors of the CPU
        return architectures.TRITON[0]
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context in which kernels are launched on ``device``."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def precision(dtype: torch.dtype, target: str) -> str:
    """Return the precision of matrix products of ``dtype``: float32 takes three TF32 passes, or IEEE on AMD.

    One TF32 pass keeps 10 bits of the mantissa, which is not float32. AMD's matrix cores multiply float32 natively.
    """
    return "tf32x3" if dtype == torch.float32 and target != "gfx942" else "ieee"


def power_of_2(number: int) -> int:
    """Return the smallest power of 2 that is at least ``number``."""
    return 1 << max(0, number - 1).bit_length()


def width(columns: int) -> int:
    """Return the tile width for rows of ``columns`` elements: a power of 2, at least 16 for matrix instructions."""
    return max(16, power_of_2(columns))


def wide(rows: int, *strides: int) -> bool:
    """Return whether offsets within ``rows`` rows of these strides (in elements) need more than 32 bits."""
    return rows * max(strides) >= 2**31
