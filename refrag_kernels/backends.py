"""Public functions on backends: restrict which one runs, and report what this build and machine support."""

from __future__ import annotations

import warnings

import torch

from refrag_kernels import selection
from refrag_kernels.report import Report, collect
from refrag_kernels.selection import effective_backend, missing, use_backend

__all__ = ["Report", "available", "effective_backend", "missing", "report", "use_backend"]


def available(op: str, device: torch.device, *deprecated: torch.device) -> list[str]:
    """Return the backends that support ``op`` on ``device`` in this build, in order of preference."""
    if deprecated:
        warnings.warn("available: the family of an op is no longer passed", DeprecationWarning, stacklevel=2)
        (device,) = deprecated
    return selection.available(op, device)


def pinned(backend: str | None) -> str | None:
    """Return ``effective_backend(backend)``: its former name."""
    warnings.warn("pinned was renamed effective_backend", DeprecationWarning, stacklevel=2)
    return effective_backend(backend)


def report() -> Report:
    """Report versions, devices, compiled kernels and the backends of each op, for this build and machine.

    Returns
    -------
    Report
        Print it, or run ``python -m refrag_kernels``, to paste it into a bug report; it contains no paths.

    Examples
    --------
    >>> import refrag_kernels as rk
    >>> "reference" in rk.backends.report().ops["mixed_attention"]["cpu"]
    True
    """
    return collect()
