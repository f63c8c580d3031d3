"""Where a kernel is launched: the device, its architecture, and the shapes that kernels are specialised for."""

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
    """Return which of ``architectures.TRITON`` the configurations for ``device`` are taken from."""
    if device.type != "cuda":  # the interpreter runs kernels on tensors of the CPU
        return architectures.TRITON[0]
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context in which kernels are launched on ``device``."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def precision(dtype: torch.dtype, target: str) -> str:
    """Return how products of ``dtype`` are made: float32 by three TF32 passes, or IEEE where that does not exist.

    One pass of TF32 keeps 10 bits, which is not float32. AMD's matrix cores multiply float32 as it is.
    """
    return "tf32x3" if dtype == torch.float32 and target != "gfx942" else "ieee"


def power_of_2(number: int) -> int:
    """Return the smallest power of 2 that is at least ``number``."""
    return 1 << max(0, number - 1).bit_length()


def width(columns: int) -> int:
    """Return the width of a tile that holds rows of ``columns``; matrix instructions need 16."""
    return max(16, power_of_2(columns))


def wide(rows: int, *strides: int) -> bool:
    """Return whether distances between ``rows`` rows that are ``strides`` elements apart need more than 32 bits."""
    return rows * max(strides) >= 2**31
