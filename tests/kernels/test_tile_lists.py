"""Tile lists against the plans that they are derived from, and the amount of work they issue for a mask."""

import random

import pytest
import torch

import refrag_kernels as rk
from refrag_kernels import tile_lists
from refrag_kernels.plan_fields import PlanSize
from refrag_kernels.reference.mask import allowed_pairs
from refrag_kernels.tile_lists import TILE_LISTS
from tests.support.factory import random_plan_problem

STEP = 64  # rows of the other side per kernel iteration


@pytest.fixture(autouse=True)
def tile_lists_on_the_cpu(monkeypatch):
    monkeypatch.setattr(tile_lists, "wanted", lambda device: True)


def expand(plan, index):
    """Expand a tile list to a bool matrix [T_q, T_kv], in plain Python."""
    tile_list = TILE_LISTS[index]
    items, ranges, partial_tiles, *partials = (
        tensor.tolist() for tensor in tile_lists.tensors_of(plan.tiles, tile_list)
    )
    sizes = plan.sizes.tolist()
    allowed = torch.zeros(sizes[PlanSize.Q_ROWS], sizes[PlanSize.KV_ROWS], dtype=torch.bool)
    seen = allowed.T if tile_list.keys else allowed
    of_keys = plan.kv_blocks, sizes[PlanSize.KV_BLOCKS]
    blocks, count = of_keys if tile_list.keys else (plan.q_blocks, sizes[PlanSize.Q_BLOCKS])
    blocks = blocks.tolist()[:count]
    shifts = torch.arange(32)
    groups = -(-len(blocks) // tile_list.group)
    assert [item[3] for item in items] == sorted(item[3] for item in items)
    assert {item[3] for item in items} >= set(range(groups + 1))
    partial_of = [item[4] for item in items[:-1] if item[4] >= 0]
    assert partial_of == list(range(len(partial_of)))
    if tile_list.keys:
        of_partials = [group for group in partials[0] if group >= 0]
        assert of_partials == [item[3] for item in items[:-1] if item[4] >= 0] and (len(partials[0]) > 2) == bool(
            partial_of
        )
    for item, after in zip(items, items[1:]):
        group, split = item[3], item[4] >= 0
        assert split == (sum(other[3] == group for other in items[:-1]) > 1)
        first = group * tile_list.group
        mine = [slice(start, start + count) for start, count, *_ in blocks[first : first + tile_list.group]]
        first_range, first_tile, first_step, *_ = item
        last_range, last_tile, last_step, *_ = after
        assert last_step - first_step == sum(end - start for start, end in ranges[first_range:last_range]) // STEP
        for start, end in ranges[first_range:last_range]:
            assert end > start and (end - start) % STEP == 0
            for rows in mine:
                assert not seen[rows, start:end].any()
                seen[rows, start:end] = True
        assert partial_tiles[first_tile:last_tile] == sorted(partial_tiles[first_tile:last_tile])
        for start, count, *codes in partial_tiles[first_tile:last_tile]:
            assert 1 <= count <= 16 and max(codes) > -1 or -2 in codes
            for rows, code in zip(mine, codes):
                if code == -1:
                    continue
                tile = seen[rows, start : start + count]
                assert not tile.any()
                if code == -2:
                    tile[:] = True
                else:
                    bits = (plan.partial_bits[code][:, None] >> shifts & 1).bool().view(16, 16)
                    tile[:] = (bits.T if tile_list.keys else bits)[: tile.shape[0], :count]
    return allowed


@pytest.mark.parametrize("first_seed", range(0, 60, 20))
def test_lists_stand_for_the_pairs_of_the_plan(first_seed):
    for seed in range(first_seed, first_seed + 20):
        problem = random_plan_problem(random.Random(seed))
        capacity = rk.PlanCapacity.for_rows(2048, sequences=8, ranges_per_block=40) if seed % 3 else None
        plan, allowed = problem.plan(capacity=capacity), problem.allowed()
        for index in range(len(TILE_LISTS)):
            assert torch.equal(expand(plan, index), allowed), f"seed {seed}, list {index}"


def test_a_plan_that_is_moved_has_the_lists_of_one_that_is_made_there(monkeypatch):
    layout = rk.ChunkLayout.from_lengths([[20, 3], [70]])
    want = rk.plan_attention(layout)
    with monkeypatch.context() as patch:
        patch.setattr(tile_lists, "wanted", lambda device: False)
        plan = rk.plan_attention(layout)
    assert not plan.tiles and plan.to("meta").sizes.device.type == "meta"
    moved = plan.to("meta")
    assert [t.shape for t in moved.tensors()] == [t.shape for t in want.tensors()]


def test_plans_for_the_cpu_have_none(monkeypatch):
    monkeypatch.undo()
    assert not rk.plan_attention(rk.ChunkLayout.from_lengths([[20, 3]])).tiles


def test_a_refilled_plan_keeps_its_buffers():
    capacity = rk.PlanCapacity.for_rows(256, sequences=2)
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[100]]), capacity=capacity)
    before = [tensor.data_ptr() for tensor in plan.tensors()]
    rk.plan_attention(rk.ChunkLayout.from_lengths([[30], [150]]), capacity=capacity, out=plan)
    assert before == [tensor.data_ptr() for tensor in plan.tensors()]
    allowed = allowed_pairs(rk.ChunkLayout.from_lengths([[30], [150]]), rk.ChunkMask.full())
    assert torch.equal(expand(plan, 1), allowed)


def work(plan, index):
    """Return the number of pairs that a kernel computes: whole tiles of rows, whole iterations."""
    items, ranges, *_ = tile_lists.tensors_of(plan.tiles, TILE_LISTS[index])
    steps = (ranges[:, 1] - ranges[:, 0]).sum().item() // STEP
    assert items[-1, 2] == steps
    steps += (-(-items[:, 1].diff() // (STEP // 16))).sum().item()
    return steps * STEP * 16 * TILE_LISTS[index].group


def work_of_blocks(allowed, size=128):
    """Return the number of pairs computed with a mask of square blocks, such as flex_attention's."""
    rows = -(-allowed.shape[0] // size) * size
    padded = torch.zeros(rows, rows, dtype=torch.bool)
    padded[: allowed.shape[0], : allowed.shape[1]] = allowed
    return int(padded.unfold(0, size, size).unfold(1, size, size).any(3).any(2).sum()) * size * size


@pytest.mark.parametrize(
    ("first", "causal", "bounds"),
    [
        # Chunks at multiples of 16 rows, 14 % of all pairs: 1.21, 1.81 and 1.81; 3.02 by blocks of 128.
        (16, False, (1.35, 1.9, 1.9)),
        # Chunks that straddle tiles, 8 %: 1.46, 2.08 and 1.74; 2.96.
        (40, True, (1.5, 2.1, 1.8)),
    ],
)
def test_work_follows_the_chunks(first, causal, bounds):
    """Ratio of computed to allowed pairs, for 15 passages of 128 rows in chunks of 16 between two spans of text.

    For the list of single blocks, whose heads fill a tile, of four blocks, and of four key blocks.
    """
    layout = rk.ChunkLayout.from_lengths([[first] + [16] * 8 * 15 + [60]])
    mask = rk.ChunkMask.passages(torch.tensor([-1] + [i // 8 for i in range(8 * 15)] + [-1]))
    allowed = allowed_pairs(layout, mask, causal=causal)
    plan = rk.plan_attention(layout, mask, causal=causal)
    needed = int(allowed.sum())
    ratios = [work(plan, index) / needed for index in range(3)]
    theirs = work_of_blocks(allowed) / needed
    assert all(ratio <= bound for ratio, bound in zip(ratios, bounds)), ratios
    assert ratios[0] <= 0.5 * theirs and max(ratios) < 0.8 * theirs, (ratios, theirs)
