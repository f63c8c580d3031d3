"""Compare calls that compute the same result: check each, time the correct ones round-robin, and record all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from bench.engine.case import error_of
from bench.engine.timing import Times, interleave
from bench.gpu_report.block import Options, Results

Call = Callable[[], object]


def contest(
    case: str,
    calls: Mapping[str, Call],
    expected: object,
    bound: float,
    options: Options,
    results: Results,
    *,
    rounds: int = 21,
    view: Callable[[object], object] = lambda result: result,
    values: Callable[[Times], dict[str, float]] = lambda times: {},
    said: Mapping[str, Mapping[str, object]] | None = None,
) -> None:
    """Add a line of results for each of ``calls``, timed over ``rounds`` rounds (one round on the CPU).

    Parameters
    ----------
    case : str
    calls : dict of str to callable
        A call that raises is recorded as failed, and the others continue.
    expected : tensor or tuple of tensors
        In float64.
    bound : float
        Maximum relative error of the whole result.
    options : Options
    results : Results
    rounds : int
    view : callable
        Selects the part of a result to compare with ``expected``.
    values : callable
        Computes additional values of a line from its times.
    said : dict of str to dict
        Additional values per name.
    """
    said = said or {}
    right: dict[str, Call] = {}
    found: dict[str, dict[str, object]] = {}
    first: object = None
    for name, call in calls.items():
        about = {"contender": name, **said.get(name, {})}
        try:
            result = view(call())
        except Exception as error:  # another library, or an unsupported device; the others may work
            results.add(case, status="failed", reason=f"{type(error).__name__}: {str(error)[:300]}", **about)
            continue
        error_ = error_of(result, expected)
        if not error_ <= bound:
            finite = error_ if math.isfinite(error_) else None
            results.add(case, status="wrong", error=finite, reason="differs from float64", **about)
            continue
        first = result if first is None else first
        right[name] = call
        found[name] = {**about, "error": error_, "bits_of_the_first": _same(result, first)}
    times = interleave(right, *((1, 0) if options.dry_run else (rounds, 2)), device=options.device)
    for name, took in times.items():
        results.add(
            case,
            median_s=took.median,
            p20_s=took.quantile(0.2),
            p80_s=took.quantile(0.8),
            **values(took),
            **found[name],
        )


def _same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return isinstance(a, tuple) and isinstance(b, tuple) and all(map(_same, a, b))
