"""Measure benchmark rows within a block: one line of results per contender, written before the next row starts."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

from bench.engine import results as records
from bench.engine.case import Entry
from bench.engine.run import OURS, measure, unmeasured
from bench.gpu_report.block import Options, Results

_LEAST = 3.0  # approximate seconds per row


def measure_rows(
    entries: Iterable[Entry], options: Options, results: Results, *, backends: Sequence[str] = (), **how: Any
) -> list[str]:
    """Check and time rows while time remains; return those in which refrag_kernels was wrong or failed.

    Parameters
    ----------
    entries : iterable of Entry
    options : Options
    results : Results
    backends : sequence of str
        Time refrag_kernels on each of these; on the CPU, on the default backend.
    **how
        Passed to ``bench.engine.run.measure``; ``rounds`` defaults to 11, or 1 on the CPU.
    """
    bad = []
    # Three copies of the tensors on a GPU, so that rotating calls read them from memory and not from a cache.
    defaults = {"copies": 1, "memory": False} if options.dry_run else {"copies": 3}
    how = {"rounds": 11, **defaults, **how, **({"rounds": 1} if options.dry_run else {})}
    for entry in entries:
        if options.seconds_left < _LEAST and not options.dry_run:
            outcome = unmeasured(entry, skipped="out of time")
        else:
            try:
                names = () if options.dry_run else backends
                outcome = measure(entry, device=options.device, backends=names, **how)
            except Exception as error:  # the next row may work
                traceback.print_exc()
                outcome = unmeasured(entry, failed=error)
        if outcome.failed or any(name.startswith(OURS) for name in outcome.wrong):
            bad.append(entry.name)
        for record in records.records(outcome):
            results.add(**_finite(record))
        del outcome  # frees the tensors that its calls hold
    return bad


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with a JSON-compatible error: NaN results have an infinite error."""
    if record["error"] is not None and not math.isfinite(record["error"]):
        return {**record, "error": None, "reason": "not finite"}
    return record
