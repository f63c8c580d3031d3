"""Counts of issued work against plain loops and flex_attention's block mask; the model of minimum times."""

import dataclasses

import pytest
import torch

import refrag_kernels as rk
from bench.cases import peers
from bench.cases.presets import PRESETS
from bench.cases.problems import of_passages
from bench.cases.prompts import Passages, Prompt
from bench.static import roofline, work
from refrag_kernels import tile_lists

pytestmark = pytest.mark.cpp

PROBLEMS = {(problem.name, problem.group): problem for problem in work.problems()}
SMALL = Passages(512, 16, 0.4)


@pytest.fixture(scope="module")
def small():
    mask = rk.ChunkMask.from_dense(SMALL.chunk_mask())
    return work.Problem("small", SMALL.layout(), mask, False, "llama3.2-1b")


def test_the_goal_of_passages_at_12_percent():
    """The work issued is at most 1.35 times the work needed, and at most half that of 128 x 128 blocks."""
    for group in (1, 4):
        problem = PROBLEMS["passages of 128, 2048 rows, 12.0%", group]
        plan, dense = problem.plan(), problem.dense()
        needed = int(dense.sum())
        assert needed / dense.numel() == pytest.approx(0.12, abs=0.002)
        for ours in (work.by_plan(plan), work.by_triton(plan, problem.group, problem.head_dim)):
            assert needed <= ours <= 1.35 * needed and ours <= work.by_blocks(dense, 128) / 2


@pytest.mark.parametrize(("length", "ratio"), [(8, 2), (16, 1), (32, 1)])
def test_short_chunks_have_tiles_of_their_own(length, ratio):
    """Two chunks of 8 share the 16 rows of a matrix instruction; longer chunks issue exactly what they need."""
    problem = PROBLEMS[f"encoder, {2048 // length} chunks of {length}", 1]
    plan, needed = problem.plan(), 2048 * length
    assert int(problem.dense().sum()) == needed
    for group in (1, 2, 4, 8):
        assert work.by_triton(plan, group, 64) == ratio * needed == work.by_plan(plan)


def test_chunks_of_uneven_lengths_have_tiles_of_their_own():
    """They start inside blocks of 16 rows; only the 16 x 16 tiles with an allowed pair are issued."""
    problem = PROBLEMS["encoder, 85 chunks of 16 to 32", 1]
    plan = problem.plan()
    for group in (1, 2, 4, 8):
        assert work.by_triton(plan, group, 64) == work.by_plan(plan) == work.by_blocks(problem.dense(), 16)


def test_blocks_are_those_of_flex_attention(small):
    mask = peers.block_mask(of_passages(SMALL), 128, "cpu")
    blocks = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    assert work.by_blocks(small.dense(), 128) == blocks * 128 * 128


def test_blocks_at_the_edge():
    dense = torch.zeros(130, 70, dtype=torch.bool)
    dense[129, 69] = dense[0, 0] = True
    assert work.by_blocks(dense, 64) == 2 * 64 * 64


@pytest.mark.parametrize("heads", [(1, 4, 32), (4, 1, 64), (3, 4, 64)])
def test_triton_by_a_walk_over_its_lists(small, heads):
    """Count the iterations of the kernel's two loops for each tile, one by one."""
    group, blocks, _ = heads
    plan = small.plan()
    units, ranges, _ = tile_lists.tensors_of(plan.tiles, tile_lists.TileList(False, blocks))
    pairs = 0
    for tile in range(len(units) - 1):
        (first_range, first_entry), (last_range, last_entry) = units[tile : tile + 2, :2].tolist()
        steps = sum(len(range(*ranges[index].tolist(), 64)) for index in range(first_range, last_range))
        steps += len(range(first_entry, last_entry, 4))
        filled = {1: 1, 3: 3, 4: 4}[group]  # heads in a group's tiles
        pairs += steps * 64 * 16 * blocks * filled
    assert work.by_triton(plan, group, 64) == pairs / group
    assert pairs / group >= int(small.dense().sum())


def test_flashinfer_by_hand():
    """Two blocks: 20 rows that attend to 40 keys, 3 rows to 10; the mean of 11.5 rows selects tiles of 16."""
    dense = torch.zeros(23, 40, dtype=torch.bool)
    dense[:20] = True
    dense[20:, :10] = True
    assert work.by_flashinfer(dense, 1, 64) == 32 * 48 + 16 * 16
    # With 4 heads per key the mean is 46, which selects tiles of 64; 80 rows need two of them.
    assert work.by_flashinfer(dense, 4, 64) == (128 * 48 + 64 * 16) / 4


def test_the_page_is_up_to_date():
    assert work.PAGE.read_text() == work.page(), "run python -m bench.work --output docs/gpu-work.md"


def test_floors_are_the_larger_of_products_and_traffic():
    gpu = roofline.Gpu(flops=100.0, bandwidth=10.0)
    some = roofline.Work("some", flops=400.0, bytes=20.0)
    assert (some.floor(gpu), some.bound(gpu)) == (4.0, "products")
    other = dataclasses.replace(some, bytes=80.0)
    assert (other.floor(gpu), other.bound(gpu)) == (8.0, "memory")


def test_work_of_a_layer_by_hand():
    shape = PRESETS["llama2-7b"]
    layout = rk.ChunkLayout.from_lengths([[64]])
    plan = rk.plan_attention(layout, causal=False)
    found = roofline.attention("full", plan, shape)
    assert found.flops == 2 * 2 * 64 * 64 * 32 * 128
    tensors = 4 * 64 * 32 * 128 * 2 + 64 * 32 * 4  # q, k, v, out; lse
    assert tensors < found.bytes < tensors + 10_000  # plus the plan
    prompt = Prompt(16 * 8 + 128, 16, 0.0)  # 8 slots, 128 rows of text
    mixed = roofline.assembly(prompt, shape)
    assert mixed.flops == 2 * 8 * (1024 * 4096 + 4096 * 4096)
    weights = 1024 * 4096 + 4096 * 4096 + 2 * 4096
    assert mixed.bytes == 2 * (weights + 8 * 1024 + 2 * 8 * 4096 + 128 * 4096 + 136 * 4096) + 136 * 12


def test_the_model_is_printed_as_a_model(capsys):
    assert roofline.main(["--preset", "llama2-7b", "--context", "2048", "--k", "16"]) == 0
    text = capsys.readouterr().out
    assert "not a measurement" in text and all(f"{name}, us" in text for name in roofline.GPUS)
    assert text.count("attention, k = 16") == 1
    with pytest.raises(SystemExit):
        roofline.main(["--k", "0"])
