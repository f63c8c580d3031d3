"""The published rows as pytest-benchmark cases: ``pytest -m published tests/bench``.

Each row has two benchmarks, refrag_kernels and the first peer. A result that differs from float64 fails.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from bench.cases import table  # noqa: E402
from bench.cases.ops import KERNEL_OPS  # noqa: E402
from bench.engine.case import Entry, Skip, error_of  # noqa: E402
from bench.engine.run import OURS  # noqa: E402

# Without flex_attention, which takes half a minute per shape to compile: `python -m bench run` includes it.
ENTRIES = table.published(flex=False, ops=KERNEL_OPS)


@pytest.mark.published
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
@pytest.mark.parametrize("who", ["ours", "first peer"])
def test_row(entry: Entry, who: str, benchmark) -> None:
    case = entry.build()
    with torch.enable_grad() if case.grad else torch.no_grad():
        expected = case.expected() if case.expected else None
        name, call = (OURS, case.ours) if who == "ours" else next(iter(case.peers.items()))
        try:
            result = call()
        except Skip as reason:
            pytest.skip(f"{name}: {reason}")
        if expected is not None:
            assert error_of(result, expected) <= (case.bound if who == "ours" else 10 * case.bound)
        benchmark.group = entry.name
        benchmark.extra_info.update(contender=name, op=entry.op, dtype=entry.dtype_name, **entry.parameters)
        benchmark.pedantic(call, rounds=5, warmup_rounds=1)
