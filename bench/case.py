"""A benchmark case: one problem, who computes it, what it costs and how right it has to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

Call = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Goal:
    """What the case is to reach: a ratio to the best peer, or a share of a limit of the machine."""

    against_peers: float | None = None
    share_of_matmul: float | None = None
    share_of_bandwidth: float | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the benchmark.

    Attributes
    ----------
    op, name : str
        The op's name and what tells this case from its others.
    dtype : torch.dtype
    ours : callable
        The op; its result is compared with ``expected``.
    peers : dict of str to callable
        Others that compute the same; those that can't run here are left out by whoever makes the case.
    expected : callable or None
        The result in float64; None where there is none to compare (a plan).
    bound : float
        Greatest relative error in the Frobenius norm.
    flops, bytes : float
        Useful work and traffic: what any implementation has to do.
    goal : Goal
    notes : str
        What the times leave out.
    """

    op: str
    name: str
    dtype: torch.dtype
    ours: Call
    peers: dict[str, Call]
    expected: Call | None = None
    bound: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    goal: Goal = Goal()
    notes: str = ""


def bound_of(dtype: torch.dtype) -> float:
    """Return the accuracy that outputs must have."""
    return 2e-6 if dtype == torch.float32 else 4e-3


def error_of(actual: object, expected: object) -> float:
    """Return the largest relative error, in the Frobenius norm, of a tensor or a tuple of them; NaN is infinite."""
    if isinstance(actual, (tuple, list)):
        return max(error_of(a, e) for a, e in zip(actual, expected, strict=True))  # type: ignore[arg-type]
    assert isinstance(actual, torch.Tensor) and isinstance(expected, torch.Tensor)
    difference = (actual.double() - expected.double()).norm() / expected.double().norm()
    return float(difference) if bool(difference.isfinite()) else float("inf")
