"""Checks of shape, dtype, device and stride, shared by public functions and fake kernels.

Each raises an error that names the argument, what it got and what it needs. None of them reads a tensor's values.
"""

from __future__ import annotations

import functools
import math
import numbers
import operator
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INT32_MAX = 2**31 - 1
_PLAIN = frozenset((type(None), str, int, torch.device))
_MOST_REMEMBERED = 1024  # keys of a few hundred bytes each
MAX_HEAD_DIM = 256  # limited by the kernels' use of registers and shared memory


# The devices and dtypes of autocast, which leaves float64 alone.
AUTOCAST_DEVICES = ("cpu", "cuda")
AUTOCAST_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def autocast_is_on(device: torch.device) -> bool:
    """Return whether ops on ``device`` run under autocast; torch can't say for some devices, such as meta."""
    return device.type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type)


def same_under_autocast(first: torch.dtype, second: torch.dtype) -> bool:
    """Return whether two dtypes are the same under autocast."""
    return first == second or (first in AUTOCAST_DTYPES and second in AUTOCAST_DTYPES)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def unchecked(cls: type[T], **fields: object) -> T:
    """Create an instance of a frozen dataclass without ``__post_init__``, for fields that are known to be valid."""
    instance = object.__new__(cls)
    instance.__dict__.update(fields)
    return instance


def as_int(name: str, value: object, least: int) -> int:
    """Convert an integer of any type, such as NumPy's, to int; it must be from ``least`` to the largest int32."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: got {value!r}, needs an integer") from None
    if not least <= number <= INT32_MAX:
        raise ValueError(f"{name}: got {number}, needs {least} to {INT32_MAX}")
    return number


def remembered(check: Callable[..., None]) -> Callable[..., None]:
    """Skip ``check`` for arguments of a kind that it accepted before, as layers repeat each other's calls.

    ``check`` may depend on shapes, strides, dtypes and devices of tensors, but not on their values. With autocast it
    must accept at least what it accepts without.
    """
    accepted: set[tuple] = set()

    @functools.wraps(check)
    def checked(*args: object) -> None:
        if torch.compiler.is_compiling():
            return check(*args)
        key: list[object] = []
        for value in args:
            kind = type(value)
            if kind is torch.Tensor or kind is torch.nn.Parameter:
                key += (value.shape, value.stride(), value.dtype, value.device)  # type: ignore[attr-defined]
            elif kind in _PLAIN:
                key.append(value)
            else:  # a subclass of Tensor may have symbolic sizes
                return check(*args)
        likeness = tuple(key)
        if likeness in accepted:
            return None
        check(*args)
        first = args[0]
        if isinstance(first, torch.Tensor) and not autocast_is_on(first.device):
            if len(accepted) >= _MOST_REMEMBERED:
                accepted.clear()
            accepted.add(likeness)
        return None

    return checked


def check_dtype(name: str, tensor: torch.Tensor, *dtypes: torch.dtype) -> None:
    """Raise TypeError unless ``tensor`` is a tensor of one of ``dtypes``."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, needs a torch.Tensor")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {_names((tensor.dtype,))}, needs {_names(dtypes)}")


def check_same_dtype(**tensors: torch.Tensor) -> None:
    """Raise TypeError unless all ``tensors`` have the dtype of the first, or get it from autocast."""
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.dtype != reference.dtype:
            if autocast_is_on(reference.device) and same_under_autocast(tensor.dtype, reference.dtype):
                continue
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
    """Raise ValueError unless ``tensor`` has this shape; a string names a free dimension."""
    # A loop, not all() over a generator: each decoding step runs a dozen of these checks.
    sizes = tensor.shape
    fits = len(sizes) == len(shape)
    for got, want in zip(sizes, shape):
        fits = fits and (isinstance(want, str) or got == want)
    if not fits:
        wanted = ", ".join(str(want) for want in shape)
        raise ValueError(f"{name}: got shape {list(sizes)}, needs [{wanted}]")


def check_last_contiguous(**tensors: torch.Tensor) -> None:
    """Raise ValueError unless the last dimension of each tensor is contiguous."""
    for name, tensor in tensors.items():
        if tensor.dim() and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name}: got stride {tensor.stride(-1)} in its last dimension, needs 1 (contiguous)")


def check_head_dim(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless the last dimension of ``tensor`` is a head dimension that the kernels support."""
    head_dim = tensor.shape[-1]
    if head_dim % 8 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{name}: got head_dim {head_dim}, needs a multiple of 8 up to {MAX_HEAD_DIM}")


def check_heads(q: torch.Tensor, k: torch.Tensor, sinks: torch.Tensor | None) -> None:
    """Check head counts and the head_dim of q [T_q, H_q, D] and of keys whose last two dimensions are H_kv, D."""
    check_head_dim("q", q)
    heads = q.shape[1]
    if k.shape[-2] == 0 or heads % k.shape[-2]:
        raise ValueError(f"q: got {heads} heads, needs a multiple of the {k.shape[-2]} key/value heads")
    if sinks is not None:
        check_dtype("sinks", sinks, torch.float32, *((torch.float64,) if q.dtype == torch.float64 else ()))
        check_shape("sinks", sinks, heads)


def check_score_options(scale: float | None, softcap: float | None) -> None:
    """Raise TypeError or ValueError unless scale is None or a finite number, and softcap None or a positive one."""
    if scale is not None:
        check_number("scale", scale)
    if softcap is not None:
        check_number("softcap", softcap)
        if not softcap > 0:
            raise ValueError(f"softcap: got {softcap}, needs a positive number or None")
        if not softcap >= _SMALLEST:
            raise ValueError(
                f"softcap: got {softcap}, needs at least 2^-126, the smallest number that float32 divides by"
            )


_NUMBERS = (float, int, numbers.Real, torch.SymFloat, torch.SymInt)
# Kernels compute in float32, some with the product of a number and log2(e): beyond these it is inf, or divides by 0.
_LARGEST, _SMALLEST = 2.0**126, 2.0**-126


def check_number(name: str, value: object) -> None:
    """Raise TypeError or ValueError unless ``value`` is a finite number, with room in float32."""
    if not isinstance(value, _NUMBERS):
        raise TypeError(f"{name}: got {type(value).__name__}, needs a number")
    if not -math.inf < value < math.inf:  # type: ignore[operator]
        raise ValueError(f"{name}: got {value}, needs a finite number")
    if not -_LARGEST <= value <= _LARGEST:  # type: ignore[operator]
        raise ValueError(f"{name}: got {value}, needs a number from -2^126 to 2^126, which float32 holds")


def window_bounds(window: int | tuple[int, int] | None, causal: bool = True) -> tuple[int, int]:
    """Return the bounds (left, right) of a window combined with causality; -1 means no bound."""
    if window is None:
        return -1, 0 if causal else -1
    if not isinstance(window, int) or isinstance(window, bool):
        window = _window_of(window)
    if isinstance(window, int):
        if not causal:
            raise ValueError(f"window: got the int {window} without causal, needs a pair (left, right)")
        if window < 1:
            raise ValueError(f"window: got {window}, needs at least 1")
        left, right = window - 1, -1
    else:
        left, right = window
        if left < -1 or right < -1:
            raise ValueError(f"window: got {window}, needs -1 or more on each side")
    return min(left, INT32_MAX), 0 if causal else min(right, INT32_MAX)


def _window_of(window: Any) -> int | tuple[int, int]:
    """Convert a window whose integers have other types, such as NumPy's, to ints."""
    try:
        if not isinstance(window, bool):
            return operator.index(window)
    except TypeError:
        pass
    try:
        first, second = window
        return operator.index(first), operator.index(second)
    except (TypeError, ValueError):
        raise TypeError(f"window: got {window!r}, needs an int, a pair of ints (left, right) or None") from None
