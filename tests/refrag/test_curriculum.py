"""The curriculum compared with the paper's table 8."""

from collections import Counter

import pytest
from refrag.training import PAPER_TABLE, draw_samples, scaled_table


def test_paper_table_has_the_paper_s_sums():
    sums = {chunks: sum(row) for chunks, row in PAPER_TABLE.items()}
    assert sums == {1: 2000, 2: 2001, 4: 2000, 8: 4000, 16: 4000, 32: 4001, 64: 8002, 128: 8002, 256: 8002}


def test_the_rule_gives_the_paper_s_table_back():
    assert scaled_table(42_000) == PAPER_TABLE


@pytest.mark.parametrize("samples, max_chunks", [(1000, 256), (5000, 8), (300_000, 64), (777, 1)])
def test_a_scaled_table_is_near_its_budget(samples, max_chunks):
    table = scaled_table(samples, max_chunks=max_chunks)
    assert max(table) <= max_chunks
    assert abs(sum(map(sum, table.values())) - samples) <= 4.5 * len(table)


def test_draws_every_sample_once_in_stage_order_and_repeats_with_the_seed():
    table = scaled_table(2000)
    samples = list(draw_samples(table, seed=3))
    assert [stage for stage, _ in samples] == sorted(stage for stage, _ in samples)
    expected = {(stage, chunks): n for chunks, row in table.items() for stage, n in enumerate(row) if n}
    assert Counter(samples) == expected
    assert samples == list(draw_samples(table, seed=3))
    assert samples != list(draw_samples(table, seed=4))


@pytest.mark.parametrize("name, fields", [("samples", {"samples": 0}), ("samples", {"samples": 1.5}),
                                          ("max_chunks", {"samples": 9, "max_chunks": 0})])  # fmt: skip
def test_bad_input_is_named(name, fields):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        scaled_table(**fields)
