"""Select the implementation that runs an op, and restrict the selection.

==========  ====================  =====================================
backend     folder                devices
==========  ====================  =====================================
cuda        ``cuda_kernels/``     CUDA (C++ kernels of ``_C``)
triton      ``triton_kernels/``   CUDA and ROCm; imported on first use
cpu         ``cpu_kernels/``      CPU (C++ kernels of ``_C``)
reference   ``reference/``        any device; the specification
==========  ====================  =====================================

Each op declares what each backend supports and which one is preferred; see ``support``.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch

from refrag_kernels import extension
from refrag_kernels.support import OPS, Implementation, Op


@dataclasses.dataclass(frozen=True)
class Backend:
    """A set of implementations.

    Attributes
    ----------
    folder : str
        The package of its functions, with a module for each family of ops.
    devices : tuple of str, optional
        Device types; None: any.
    why_missing : callable
        Returns why the backend can't run on this machine, or None.
    values : {"before", "on failure", "on request"}
        When to check the values of integer tensors in order to name an argument: before each call on the CPU; after the
        implementation has refused them without naming the argument; or only if REFRAG_KERNELS_CHECK=1, on a GPU, whose
        kernels tolerate invalid values.
    """

    folder: str
    devices: tuple[str, ...] | None
    why_missing: Callable[[], str | None]
    values: Literal["before", "on failure", "on request"]

    @functools.cached_property
    def reason(self) -> str | None:
        """The result of ``why_missing``, cached."""
        return self.why_missing()


def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    return None if torch.cuda.is_available() else "torch finds no CUDA or ROCm device"


BACKENDS: dict[str, Backend] = {
    "cuda": Backend("cuda_kernels", ("cuda",), extension.cuda_missing, "on request"),
    "triton": Backend("triton_kernels", ("cuda",), _triton_missing, "on request"),
    "cpu": Backend("cpu_kernels", ("cpu",), extension.cpu_missing, "on failure"),
    "reference": Backend("reference", None, lambda: None, "before"),
}

_restriction: contextvars.ContextVar[tuple[str, ...] | None] = contextvars.ContextVar("refrag_backend", default=None)


def _parse(names: str, source: str) -> tuple[str, ...]:
    chosen = tuple(name.strip() for name in names.split(","))
    for name in chosen:
        if name not in BACKENDS:
            raise ValueError(f"{source}: unknown backend {name!r}; the backends are {', '.join(BACKENDS)}")
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


def effective_backend(backend: str | None) -> str | None:
    """Return the backends that a call made now is restricted to, or None.

    ``backend`` is the call's own argument, which takes precedence over ``use_backend``. The result is for the backward
    pass, which runs later and outside the block.
    """
    if backend is not None:
        return backend
    restriction = _restriction.get()
    return None if restriction is None else ",".join(restriction)


def _allowed(op: Op, backend: str | None) -> Iterable[str]:
    if backend is not None:
        return _parse(backend, "backend")
    restriction = _restriction.get()
    if restriction is not None:
        return restriction
    environment = os.environ.get("REFRAG_KERNELS_BACKEND")
    if environment:
        return _parse(environment, "REFRAG_KERNELS_BACKEND")
    return op.implementations


def select(op: Op, backend: str | None, args: Sequence) -> Implementation:
    """Return the implementation that runs ``op`` for these arguments: the first allowed one that supports them."""
    device = args[0].device.type
    reasons = []
    for name in _allowed(op, backend):
        devices = BACKENDS[name].devices
        if devices is not None and device not in devices:
            reasons.append(f"{name}: runs on {' and '.join(devices)} tensors, got {device}")
            continue
        implementation = op.implementations[name]
        reason = BACKENDS[name].reason or implementation.support.missing or implementation.unsupported(args)
        if reason is None:
            return implementation
        reasons.append(f"{name}: {reason}")
    raise RuntimeError(f"no allowed backend can serve refrag::{op.name} ({'; '.join(reasons)})")


def available(op: str, device: torch.device) -> list[str]:
    """Return the backends that support ``op`` on ``device`` in this build, in order of preference."""
    return [
        name
        for name, implementation in OPS[op].implementations.items()
        if device.type in (BACKENDS[name].devices or device.type)
        and BACKENDS[name].reason is None
        and implementation.support.missing is None
    ]


def missing() -> dict[str, str | None]:
    """Return why each backend can't run on this machine, None for those that can."""
    return {name: backend.why_missing() for name, backend in BACKENDS.items()}
