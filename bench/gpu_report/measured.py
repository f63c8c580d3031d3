"""Rows of the benchmarks as results of a block: each contender of a row a line, written before the next row begins."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

from bench.engine import results as records
from bench.engine.case import Entry
from bench.engine.run import OURS, measure, unmeasured
from bench.gpu_report.block import Options, Results

_LEAST = 3.0  # seconds that a row takes, about


def measure_rows(
    entries: Iterable[Entry], options: Options, results: Results, *, backends: Sequence[str] = (), **how: Any
) -> list[str]:
    """Check and time rows while there is time, and return those of which something of ours was wrong or failed.

    Parameters
    ----------
    entries : iterable of Entry
    options : Options
    results : Results
    backends : sequence of str
        Time ours once on each of these; on the CPU, on the one that is chosen there.
    **how
        Passed to ``bench.engine.run.measure``; ``rounds`` is 11 unless given, on the CPU 1.
    """
    bad = []
    # Tensors are there three times on a GPU, so that calls in turns find them in memory and not in a cache.
    defaults = {"copies": 1, "memory": False} if options.rehearsal else {"copies": 3}
    how = {"rounds": 11, **defaults, **how, **({"rounds": 1} if options.rehearsal else {})}
    for entry in entries:
        if options.seconds_left < _LEAST and not options.rehearsal:
            outcome = unmeasured(entry, skipped="the time was over")
        else:
            try:
                names = () if options.rehearsal else backends
                outcome = measure(entry, device=options.device, backends=names, **how)
            except Exception as error:  # the next row may be right
                traceback.print_exc()
                outcome = unmeasured(entry, failed=error)
        if outcome.failed or any(name.startswith(OURS) for name in outcome.wrong):
            bad.append(entry.name)
        for record in records.records(outcome):
            results.add(**_finite(record))
        del outcome  # and the tensors that its calls hold
    return bad


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record whose error is a number of JSON: results that are not numbers have an infinite one."""
    if record["error"] is not None and not math.isfinite(record["error"]):
        return {**record, "error": None, "reason": "not finite"}
    return record
