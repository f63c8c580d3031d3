"""Which tensors the CUDA C++ kernels take; others are left to other backends."""

from __future__ import annotations

import functools

import torch

HEAD_WIDTHS = (64, 96, 128)
_HALF_DTYPES = (torch.bfloat16, torch.float16)
_ACCESS_BYTES = 16  # of a cp.async and of a vector load


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def no_tensor_cores(tensor: torch.Tensor) -> str | None:
    """Refuse dtypes and devices without the mma.sync instructions of sm_80."""
    if tensor.dtype not in _HALF_DTYPES:
        return f"dtype {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.device.type == "cuda" and _capability(tensor.device) < (8, 0):
        return "a device older than sm_80"
    return None


def unaligned(**tensors: torch.Tensor) -> str | None:
    """Refuse tensors with rows that don't start at multiples of 16 bytes."""
    for name, tensor in tensors.items():
        elements = _ACCESS_BYTES // tensor.element_size()
        strides = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
        if tensor.data_ptr() % _ACCESS_BYTES or any(size > 1 and stride % elements for size, stride in strides):
            return f"{name} has rows that don't start at multiples of {_ACCESS_BYTES} bytes"
    return None


def attention_unsupported(q: torch.Tensor, **keys: torch.Tensor) -> str | None:
    """Return why the attention kernels can't take these queries and keys, or None."""
    if q.shape[2] not in HEAD_WIDTHS:
        return f"head width {q.shape[2]}"
    return no_tensor_cores(q) or unaligned(q=q, **keys)


def no_float64(first: torch.Tensor, *_: object, **__: object) -> str | None:
    """Refuse float64."""
    return "dtype float64" if first.dtype == torch.float64 else None
