"""Checks of shape, dtype, device and stride that public functions and fake kernels share.

Each raises an error that names the argument, what it got and what it needs. None reads a tensor's values.
"""

from __future__ import annotations

import os

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def values_are_checked() -> bool:
    """Return whether REFRAG_KERNELS_CHECK=1 asks ops on a GPU to check indices, which waits for the device."""
    return os.environ.get("REFRAG_KERNELS_CHECK") == "1"


def check_dtype(name: str, tensor: torch.Tensor, *dtypes: torch.dtype) -> None:
    """Raise TypeError unless ``tensor`` is a tensor of one of ``dtypes``."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, needs a torch.Tensor")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {_names((tensor.dtype,))}, needs {_names(dtypes)}")


def check_same_dtype(**tensors: torch.Tensor) -> None:
    """Raise TypeError unless all ``tensors`` have the dtype of the first; autocast makes that so by itself."""
    (first, reference), *others = tensors.items()
    if torch.is_autocast_enabled(reference.device.type):
        return
    for name, tensor in others:
        if tensor.dtype != reference.dtype:
            raise TypeError(
                f"{name}: got dtype {_names((tensor.dtype,))}, needs {_names((reference.dtype,))}, the dtype of {first}"
            )


def check_same_device(**tensors: torch.Tensor | None) -> None:
    """Raise ValueError unless all ``tensors`` that are not None are on the device of the first."""
    (first, reference), *others = tensors.items()
    assert reference is not None
    for name, tensor in others:
        if tensor is not None and tensor.device != reference.device:
            raise ValueError(f"{name}: got device {tensor.device}, needs {reference.device}, the device of {first}")


def check_shape(name: str, tensor: torch.Tensor, *shape: int | str) -> None:
    """Raise ValueError unless ``tensor`` has this shape; a string stands for a free dimension and names it."""
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or got == want for got, want in zip(tensor.shape, shape)
    )
    if not fits:
        wanted = ", ".join(str(want) for want in shape)
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, needs [{wanted}]")


def check_last_contiguous(**tensors: torch.Tensor) -> None:
    """Raise ValueError unless the last dimension of each tensor is contiguous."""
    for name, tensor in tensors.items():
        if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name}: got stride {tensor.stride(-1)} in its last dimension, needs 1 (contiguous)")
