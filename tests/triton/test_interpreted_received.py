"""attention_received with Triton's kernels in the interpreter, against float64."""

import pytest
import torch

import refrag_kernels as rk
from refrag_kernels import tile_lists
from refrag_kernels.triton_kernels import configs
from tests.kernels import test_attention_received as kernels
from tests.support.accuracy import relative_error
from tests.support.factory import random_attention_problem
from tests.support.nonfinite import spoilt_problem
from tests.triton.modes import ALL

LIMITS = {"max_sequences": 2, "max_chunks": 5}
SEEDS = range(60) if ALL else (1, 3, 6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", kernels.DTYPES if ALL else (torch.float32, torch.bfloat16), ids=str)
def test_against_float64(seed, dtype):
    problem = random_attention_problem(seed, dtype, **LIMITS)
    got = kernels.received(problem, "triton")
    assert relative_error(got, kernels.column_sums(problem)) <= kernels.LSE[dtype], f"seed {seed}"


@pytest.mark.parametrize("seed", range(40) if ALL else (3, 4, 17))
def test_where_nan_goes(seed):
    kernels.check_nonfinite(spoilt_problem(seed, torch.float32, **LIMITS), "triton")


@pytest.mark.parametrize(("group", "head_dim", "softcap"), ((2, 16, None), (1, 128, 3.0)) if ALL else ((1, 16, None),))
def test_keys_of_many_rows_are_split(group, head_dim, softcap):
    """A prefix that all passages attend to is split over several work items, whose sums are added."""
    lengths = [64, *[64] * 10, 40, 30, 30]
    mask = rk.ChunkMask.passages(torch.tensor([-1, *range(len(lengths) - 2), -1]))
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([lengths]), mask, causal=False)
    *_, partials = tile_lists.tensors_of(plan.tiles, tile_lists.TileList(True, 4))
    assert len(partials) > 2 and partials[0] == partials[1] == 0
    q, k = torch.randn(sum(lengths), 2 * group, head_dim), torch.randn(sum(lengths), 2, head_dim)
    _, lse = rk.mixed_attention(q.double(), k.double(), k.double(), plan, softcap=softcap, return_lse=True)
    want = rk.attention_received(q.double(), k.double(), lse, plan, softcap=softcap)
    got = rk.attention_received(q, k, lse.float(), plan, softcap=softcap, backend="triton")
    assert relative_error(got, want) <= 5e-6 and relative_error(got[:64], want[:64]) <= 5e-6


@pytest.mark.parametrize("head_dim", (128, 256) if ALL else (128,))
def test_wide_heads_in_float32(head_dim):
    """64 keys don't fit in shared memory: programs read parts of a tile of keys."""
    assert configs.attention("received", "sm_80", head_dim, 4).block_m < 64
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[50, 1, 1, 30], [20]]))
    q, k = torch.randn(102, 3, head_dim), torch.randn(102, 1, head_dim)
    _, lse = rk.mixed_attention(q.double(), k.double(), k.double(), plan, return_lse=True)
    want = rk.attention_received(q.double(), k.double(), lse, plan)
    assert relative_error(rk.attention_received(q, k, lse.float(), plan, backend="triton"), want) <= 5e-6


def test_rows_beyond_the_batch_under_a_capacity_are_zero():
    kernels.test_rows_beyond_the_batch_under_a_capacity_are_zero("triton", torch.float32)


def test_masked_rows_and_keys():
    kernels.test_masked_rows_and_keys("triton")


@pytest.mark.parametrize("lengths", [[[]], [[1]], [[], [1], []]])
def test_empty_and_single_rows(lengths):
    kernels.test_empty_and_single_rows("triton", lengths)


def test_opcheck():
    kernels.test_opcheck("triton")
