"""Decode variants: each against float64, and the results they must not change."""

import dataclasses
import itertools

import pytest
import torch

import refrag_kernels as rk
from refrag_kernels.triton_kernels import decode, paged
from refrag_kernels.triton_kernels.decode import Decode
from tests.support.accuracy import LSE, OUTPUT
from tests.support.paged_problems import assert_rows_close, make_problem
from tests.triton.modes import ALL

WAYS = [Decode(ahead, by_length) for ahead, by_length in itertools.product((False, True), repeat=2)]
# Ragged lengths: below and equal to a step of keys, and several steps.
CASES = {
    "page of 16": {"page": 16},
    "page of 7, window over parts": {"page": 7, "window": 150},
    "page of 64, visible, sinks": {"page": 64, "visible": True, "sinks": True},
    **({"page of 1": {"page": 1}, "page of 16, window": {"page": 16, "window": 5, "wide": True}} if ALL else {}),
}


def widened(problem, columns):
    """Return the problem with ``columns`` more columns in the page table, whose pages must not be read."""
    q, k_pages, v_pages, table, lengths = problem.args
    unread = torch.tensor([-1, len(k_pages), 2**31 - 1], dtype=torch.int32).repeat(len(table), -(-columns // 3))
    return dataclasses.replace(problem, args=(q, k_pages, v_pages, torch.cat([table, unread[:, :columns]], 1), lengths))


def attend(problem, way):
    with decode.use(way):
        return rk.paged_attention(*problem.args, **problem.options, return_lse=True, backend="triton")


@pytest.mark.parametrize("case", CASES)
def test_each_way_equals_dense_float64(case, monkeypatch):
    """In a table of the lengths, and in one much wider."""
    monkeypatch.setattr(paged, "_MIN_SPLIT_KEYS", 64)
    problem = make_problem(3, [1, 0, 37, 300, 64], dtype=torch.float32, heads=(4, 2), dim=32, **CASES[case])
    for table in (problem, widened(problem, 90)):
        results = {way: attend(table, way) for way in WAYS}
        for way, (out, lse) in results.items():
            assert_rows_close(out, problem.out, OUTPUT, f"{way}: out")
            assert_rows_close(lse, problem.lse, LSE, f"{way}: lse")
        # The same matrix products in the same order.
        for by_length in (False, True):
            for a, b in zip(results[Decode(False, by_length)], results[Decode(True, by_length)]):
                assert torch.equal(a, b)


def test_a_row_for_every_sequence_is_divided_by_its_own_length(monkeypatch):
    """Every part of a long table has keys to read, unless a sequence has fewer steps than parts."""
    states = []
    merge = paged.paged_attention_merge_kernel

    class Recorder:
        def __getitem__(self, grid):
            def run(out_parts, lse_parts, *args, **kwargs):
                states.append(lse_parts.isfinite().any(2).T)
                merge[grid](out_parts, lse_parts, *args, **kwargs)

            return run

    monkeypatch.setattr(paged, "paged_attention_merge_kernel", Recorder())
    problem = widened(make_problem(5, [512, 100], dtype=torch.float32, heads=(2, 2), dim=16, page=16), 224)
    attend(problem, Decode(by_length=False))
    attend(problem, Decode())
    by_table, by_length = states
    parts = by_table.shape[1]
    assert parts == 17 and by_table.sum(1).tolist() == [2, 1]
    # float32 uses steps of 32 keys: 512 keys are 16 steps, 100 are 4.
    assert by_length.sum(1).tolist() == [16, 4]


def test_a_length_below_the_rows(monkeypatch):
    """Lengths are on the device alone: a bad one reads nothing that isn't there."""
    monkeypatch.setattr(paged, "_MIN_SPLIT_KEYS", 32)
    problem = make_problem(1, [90, 40], [3, 2], dtype=torch.float32, heads=(2, 1), dim=16, page=16)
    q, k_pages, v_pages, table, lengths = problem.args
    for bad in (-(2**31) + 2**20, -5, 0, 1):
        args = (q, k_pages, v_pages, table, torch.tensor([90, bad], dtype=torch.int32))
        out, lse = rk.paged_attention(*args, **problem.options, return_lse=True, backend="triton")
        assert_rows_close(out[:3], problem.out[:3], OUTPUT, f"length {bad}")
        assert out[3].eq(0).all() and lse[3].isneginf().all()
