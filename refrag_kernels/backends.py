"""Which implementation of an op runs, and how to force one.

Each backend is a folder with one module per op family; a function in it that has an op's name implements that op:

==========  ====================  =====================================
backend     folder                devices
==========  ====================  =====================================
cuda        ``cuda_kernels/``     CUDA (C++ kernels of ``_C``)
triton      ``triton_kernels/``   CUDA and ROCm; imported on first use
cpu         ``cpu_kernels/``      CPU (C++ kernels of ``_C``)
reference   ``reference/``        any device; the specification
==========  ====================  =====================================

The order of the table is the order of preference, but for the ops of ``_PREFERRED``.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

from refrag_kernels import extension

if TYPE_CHECKING:
    from refrag_kernels.report import Report


class _Backend(NamedTuple):
    folder: str
    devices: tuple[str, ...] | None  # None: any device
    missing: Callable[[], str | None]  # why the backend can't run here, None when it can


def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    return None if torch.cuda.is_available() else "torch finds no CUDA or ROCm device"


_BACKENDS: dict[str, _Backend] = {
    "cuda": _Backend("cuda_kernels", ("cuda",), extension.cuda_missing),
    "triton": _Backend("triton_kernels", ("cuda",), _triton_missing),
    "cpu": _Backend("cpu_kernels", ("cpu",), extension.cpu_missing),
    "reference": _Backend("reference", None, lambda: None),
}

# Where a backend is faster than those before it in the table, by the time on an H100 (docs/gpu-results.md). The C++
# attention's matrix instructions are those of sm_80.
_PREFERRED = {"mixed_attention": "triton", "paged_attention": "triton", "append_kv": "triton"}

_restriction: contextvars.ContextVar[tuple[str, ...] | None] = contextvars.ContextVar("refrag_backend", default=None)


def _parse(names: str, source: str) -> tuple[str, ...]:
    chosen = tuple(name.strip() for name in names.split(","))
    for name in chosen:
        if name not in _BACKENDS:
            raise ValueError(f"{source}: unknown backend {name!r}; the backends are {', '.join(_BACKENDS)}")
    return chosen


@contextlib.contextmanager
def use_backend(names: str) -> Iterator[None]:
    """Restrict the ops called inside the block to some backends.

    Parameters
    ----------
    names : str
        One backend or an ordered list, such as ``"cuda,triton"``: the first that supports a call runs it. A call that
        none of them can serve raises ``RuntimeError``.

    Raises
    ------
    ValueError
        If a name is not a backend.

    Notes
    -----
    The backward pass of an op called inside the block uses the same list.

    Examples
    --------
    >>> import torch, refrag_kernels as rk
    >>> hidden = torch.arange(6.0).reshape(3, 2)
    >>> with rk.use_backend("reference"):
    ...     rk.pool_chunks(hidden, torch.tensor([0, 1, 3], dtype=torch.int32), "mean")
    tensor([[0., 1.],
            [3., 4.]])
    """
    token = _restriction.set(_parse(names, "use_backend"))
    try:
        yield
    finally:
        _restriction.reset(token)


def pinned(backend: str | None) -> str | None:
    """Return the list of backends that a call made now is restricted to, for use by its backward pass."""
    if backend is not None:
        return backend
    restriction = _restriction.get()
    return None if restriction is None else ",".join(restriction)


@functools.cache
def _order(op: str) -> tuple[str, ...]:
    """Return all backends in the order in which they are asked to run ``op``."""
    return tuple(sorted(_BACKENDS, key=lambda name: name != _PREFERRED.get(op)))


def _allowed(op: str, backend: str | None) -> tuple[str, ...]:
    if backend is not None:
        return _parse(backend, "backend")
    restriction = _restriction.get()
    if restriction is not None:
        return restriction
    environment = os.environ.get("REFRAG_KERNELS_BACKEND")
    if environment:
        return _parse(environment, "REFRAG_KERNELS_BACKEND")
    return _order(op)


def requires(check: Callable[..., str | None]) -> Callable[[Callable], Callable]:
    """Attach ``check`` to a backend's op: given the op's arguments, it returns why they are not supported, or None."""

    def attach(function: Callable) -> Callable:
        function.unsupported = check  # type: ignore[attr-defined]
        return function

    return attach


@functools.cache
def _find(name: str, op: str, family: str) -> Callable | str:
    """Return backend ``name``'s function for ``op``, or why there is none."""
    backend = _BACKENDS[name]
    reason = backend.missing()
    if reason is not None:
        return reason
    module = f"refrag_kernels.{backend.folder}.{family}"
    if importlib.util.find_spec(module) is None:
        return f"does not implement {op}"
    return getattr(importlib.import_module(module), op, f"does not implement {op}")


def select(op: str, family: str, backend: str | None, device: torch.device, args: tuple, kwargs: dict) -> Callable:
    """Return the function that runs ``op`` for these arguments: the first allowed backend that supports them."""
    reasons = []
    for name in _allowed(op, backend):
        devices = _BACKENDS[name].devices
        if devices is not None and device.type not in devices:
            reasons.append(f"{name}: runs on {' and '.join(devices)} tensors, got {device.type}")
            continue
        function = _find(name, op, family)
        if isinstance(function, str):
            reasons.append(f"{name}: {function}")
            continue
        check = getattr(function, "unsupported", None)
        reason = None if check is None else check(*args, **kwargs)
        if reason is None:
            return function
        reasons.append(f"{name}: {reason}")
    raise RuntimeError(f"no allowed backend can serve refrag::{op} ({'; '.join(reasons)})")


def available(op: str, family: str, device: torch.device) -> list[str]:
    """Return the backends that implement ``op`` on ``device`` in this build, fastest first."""
    return [
        name
        for name in _order(op)
        if device.type in (_BACKENDS[name].devices or device.type) and not isinstance(_find(name, op, family), str)
    ]


def missing() -> dict[str, str | None]:
    """Return why each backend can't run on this machine, None for those that can."""
    return {name: backend.missing() for name, backend in _BACKENDS.items()}


def report() -> Report:
    """Tell what this build and this machine offer: versions, devices, compiled kernels, and who can run each op.

    Returns
    -------
    Report
        ``print`` shows it; ``python -m refrag_kernels`` does the same. It holds no paths: paste it into a bug report.

    Examples
    --------
    >>> import refrag_kernels as rk
    >>> "reference" in rk.backends.report().ops["mixed_attention"]["cpu"]
    True
    """
    from refrag_kernels import report as module  # it reports on this module

    return module.collect()
