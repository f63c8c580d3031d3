"""Layouts, masks and plans are created on the CPU, where the planner reads them, whatever the default device is."""

import random

import pytest
import torch

import refrag_kernels as rk
from refrag_kernels import values
from refrag_kernels.reference.mask import pairs_of_plan
from tests.support.factory import random_plan_problem


@pytest.mark.parametrize("seed", range(12))
def test_the_same_plans(seed):
    problem = random_plan_problem(random.Random(seed))
    capacity = rk.PlanCapacity.for_rows(2048, sequences=8, ranges_per_block=40)
    with torch.device("meta"):
        plan = problem.plan(capacity=capacity)
        assert torch.equal(pairs_of_plan(problem.plan().tensors()), problem.allowed()), f"seed {seed}"
        assert problem.plan(capacity=capacity, out=plan) is plan and plan.device.type == "cpu"
        assert plan.stats()["pairs_allowed"] == int(problem.allowed().sum())


def test_masks_of_lists():
    with torch.device("meta"):
        _masks_of_lists()


def _masks_of_lists():
    layout = rk.ChunkLayout.from_lengths([[2, 3, 3, 2]])
    passages = rk.ChunkMask.passages([-1, 0, 1, -1])
    assert rk.plan_attention(layout, passages).stats()["pairs_allowed"] == 46
    assert rk.plan_attention(layout, rk.ChunkMask.from_csr([0, 0, 0, 0, 1], [0])).stats()["pairs_allowed"] == 4
    assert rk.plan_attention(layout, rk.ChunkMask.passages([-1] * 4)).stats()["pairs_allowed"] == 55
    dense = rk.ChunkMask.from_dense(torch.ones(4, 4, dtype=torch.bool, device="cpu"))
    assert rk.plan_attention(layout, dense).stats()["pairs_allowed"] == 55
    visible = rk.visible_ranges(layout, passages, torch.tensor([4, 6], device="cpu"))
    assert visible.ranges.tolist() == [[0, 5], [8, 10], [0, 2], [5, 10]]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_ops_on_the_cpu(backend):
    """Errors and results of ops on CPU tensors don't depend on the default device."""
    with torch.device("meta"):
        _ops_on_the_cpu(backend)


def _ops_on_the_cpu(backend):
    q = torch.ones(4, 1, 8, device="cpu")
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[4]]))
    torch.testing.assert_close(rk.mixed_attention(q, q, q, plan, backend=backend), q)
    pages = torch.ones(1, 16, 1, 8, device="cpu")
    tables = torch.zeros(1, 1, dtype=torch.int32, device="cpu"), torch.full((1,), 4, dtype=torch.int32, device="cpu")
    visible = rk.visible_ranges(
        rk.ChunkLayout.from_lengths([[4]]), rk.ChunkMask.full(), torch.tensor([3], device="cpu")
    )
    assert torch.equal(rk.paged_attention(q[:1], pages, pages, *tables, visible=visible, backend=backend), q[:1])
    with pytest.raises(ValueError, match="page_table: got page 7"):
        rk.paged_attention(q[:1], pages, pages, tables[0] + 7, tables[1], visible=visible, backend=backend)


def test_checks_of_tables():
    """Call the checks directly, since torch ignores the default device inside an op."""
    q, pages = torch.ones(1, 1, 8), torch.ones(1, 16, 1, 8)
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.full((1,), 4, dtype=torch.int32)
    indptr, ranges = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([[0, 3], [2, 4]], dtype=torch.int32)
    with torch.device("meta"):
        values.check_paged_attention(q, pages, pages, table, lengths, None, indptr, ranges[:, :1].expand(-1, 2))
        with pytest.raises(ValueError, match="page_table: got page 7"):
            values.check_paged_attention(q, pages, pages, table + 7, lengths, None, None, None)
        with pytest.raises(ValueError, match="visible.ranges: got"):
            values.check_paged_attention(q, pages, pages, table, lengths, None, indptr, ranges)
