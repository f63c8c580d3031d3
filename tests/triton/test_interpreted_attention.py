"""mixed_attention with Triton's kernels in the interpreter, against float64."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
import triton.language as tl

import refrag_kernels as rk
from refrag_kernels import tile_lists
from refrag_kernels.plan_fields import PlanField
from refrag_kernels.triton_kernels import attention, configs, nonfinite
from tests.support.accuracy import GRADIENT, LSE, OUTPUT, relative_error
from tests.support.factory import random_attention_problem
from tests.support.nonfinite import spoilt_problem
from tests.triton.modes import ALL

# The interpreter takes about a second for a few hundred rows.
LIMITS = {"max_sequences": 2, "max_chunks": 5}
SEEDS = range(60) if ALL else (1, 3, 6)
NONFINITE = list(itertools.product(range(40), (torch.float32, torch.bfloat16, torch.float16)))
if not ALL:
    NONFINITE = [(3, torch.float32), (4, torch.float32), (4, torch.bfloat16), (4, torch.float16)]
CASES = [
    *((seed, torch.float32) for seed in SEEDS),
    *((seed, torch.float16) for seed in (SEEDS if ALL else (6,))),
    *((seed, torch.bfloat16) for seed in (SEEDS if ALL else (6,))),
]


def problem_of(seed, dtype, **options):
    return random_attention_problem(seed, dtype, **LIMITS, **options)


@functools.cache
def expected(seed, dtype):
    return problem_of(seed, dtype).expected()


@pytest.mark.parametrize(("seed", "dtype"), CASES, ids=str)
def test_against_float64(seed, dtype):
    problem = problem_of(seed, dtype)
    for name, actual in problem.run("triton").items():
        bound = {"out": OUTPUT, "lse": LSE}.get(name, GRADIENT)[dtype]
        upstream = problem.grad_out if name.startswith("d") else None
        error = relative_error(actual, expected(seed, dtype)[name], upstream)
        assert error <= bound, f"{name}: error {error:.2e}, allowed {bound:.0e}; problem_of({seed}, {dtype})"


@pytest.mark.parametrize(("seed", "dtype"), NONFINITE, ids=str)
def test_where_nan_goes(seed, dtype, monkeypatch):
    """The equivalent of tests/kernels/test_nonfinite.py for the other backends."""
    monkeypatch.setattr(nonfinite, "REPAIR_ROWS", tl.constexpr(16))  # 16 rows take the interpreter as long as one
    spoilt = spoilt_problem(seed, dtype, **LIMITS)
    spoilt.check(spoilt.spoilt.run("triton"))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16) if ALL else (torch.bfloat16,), ids=str)
def test_no_worse_than_sdpa(dtype):
    problem = problem_of(105, dtype, plain=True)
    allowed = problem.plan_problem.allowed()
    sees = allowed.any(1)
    q, k, v = (t.transpose(0, 1)[None] for t in (problem.q, problem.k, problem.v))
    theirs = F.scaled_dot_product_attention(q, k, v, allowed, enable_gqa=True)[0].transpose(0, 1)[sees]
    want = problem.expected()["out"][sees]
    assert sees.any()
    assert relative_error(problem.run("triton")["out"][sees], want) <= 1.2 * relative_error(theirs, want)


@pytest.mark.parametrize("group", (1, 2, 3, 4, 8, 11) if ALL else (1, 2, 11))
def test_heads_that_share_keys(group):
    """Each combination of heads and blocks in a tile, and sequences that share a tile."""
    layout = rk.ChunkLayout.from_lengths([[50, 1, 1, 30], [20], [], [33, 16]])
    mask = rk.ChunkMask.passages(torch.tensor([-1, 0, 1, -1, -1, -1, 3]))
    plan = rk.plan_attention(layout, mask)
    rows = layout.total_rows
    q, k, v = torch.randn(rows, 2 * group, 16), torch.randn(rows, 2, 16), torch.randn(rows, 2, 16)
    got, want = [], []
    for results, dtype, backend in ((got, torch.float32, "triton"), (want, torch.float64, "reference")):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out = rk.mixed_attention(*leaves, plan, backend=backend)
        results += [out.detach(), *torch.autograd.grad((out * out).sum(), leaves)]
    for a, b in zip(got, want):
        assert relative_error(a, b) < 2e-6


@pytest.mark.parametrize("group", (1, 2, 3, 4, 8, 11) if ALL else (3,))
@pytest.mark.parametrize(
    "lengths",
    ([[8] * 17], [[16] * 5, [32] * 2, [7]], [[3, 12, 1, 16, 4, 12, 3, 18, 7, 9, 20, 16]], [[30, 28, 31, 32, 29, 3]]),
    ids=str,
)
def test_chunks_that_attend_to_themselves(lengths, group):
    """The chunk encoder's masks: each block of 16 rows is a tile, which reads 16 keys at a time."""
    layout = rk.ChunkLayout.from_lengths(lengths)
    plan = rk.plan_attention(layout, rk.ChunkMask.diagonal(), causal=False)
    for kernel in ("forward", "dq"):
        tiles = attention.tiles_of(kernel, "sm_90", plan.tensors(), group, 16, 4, False)
        assert (tiles.blocks, tiles.block_n) == (1, 16)
    rows = layout.total_rows
    q, k, v = torch.randn(rows, 2 * group, 16), torch.randn(rows, 2, 16), torch.randn(rows, 2, 16)
    got, want = [], []
    for results, dtype, backend in ((got, torch.float32, "triton"), (want, torch.float64, "reference")):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out, lse = rk.mixed_attention(*leaves, plan, softcap=3.0, return_lse=True, backend=backend)
        results += [out.detach(), lse.detach(), *torch.autograd.grad((out * out).sum() + lse.sum(), leaves)]
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want):
        assert relative_error(a, b) <= (LSE if name == "lse" else GRADIENT)[torch.float32], name


@pytest.mark.parametrize(("head_dim", "group"), ((128, 1), (128, 8), (256, 2)) if ALL else ((128, 3),))
def test_wide_heads_in_float32(head_dim, group):
    """64 rows don't fit in shared memory: tiles have one block and read parts of a key tile."""
    assert configs.attention("dkv", "sm_80", head_dim, 4).block_m < 64
    layout = rk.ChunkLayout.from_lengths([[50, 1, 1, 30], [20]])
    rows = layout.total_rows
    plan = rk.plan_attention(layout, capacity=rk.PlanCapacity.for_rows(130, sequences=2, ranges_per_block=8))
    assert attention.tiles_of("dq", "sm_80", plan.tensors(), group, head_dim, 4, False).blocks == 1
    q, k, v, grad = (torch.randn(130, heads, head_dim) for heads in (group, 1, 1, group))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = rk.mixed_attention(*leaves, plan, return_lse=True, backend="triton")
    got = [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad)]
    exact = [t[:rows].detach().double().requires_grad_() for t in leaves]
    out, lse = rk.mixed_attention(*exact, rk.plan_attention(layout), return_lse=True, backend="reference")
    want = [out.detach(), lse.detach(), *torch.autograd.grad(out, exact, grad[:rows].double())]
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want):
        assert relative_error(a[:rows], b) <= (LSE if name == "lse" else GRADIENT)[torch.float32], name
        assert (a[rows:].isneginf() if name == "lse" else a[rows:] == 0).all(), name


@pytest.mark.parametrize(("group", "head_dim", "softcap"), ((2, 16, None), (1, 128, 3.0)) if ALL else ((1, 16, None),))
def test_keys_of_many_rows_are_split(group, head_dim, softcap):
    """A prefix that all passages attend to is split over several work items, whose sums are added; negative scale."""
    lengths = [64, *[72] * 14, 30] if group > 1 else [64, *[64] * 10, 40, 30, 30]
    mask = rk.ChunkMask.passages(torch.tensor([-1, *range(len(lengths) - 2), -1]))
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([lengths]), mask, causal=False)
    *_, slots = tile_lists.tensors_of(plan.tiles, tile_lists.TileList(True, 4))
    assert len(slots) > 2 and slots[0] == slots[1] == 0
    generator = torch.Generator().manual_seed(0)
    rows = sum(lengths)
    q, k, v = (torch.randn(rows, n, head_dim, generator=generator) for n in (2 * group, 2, 2))
    got, want = [], []
    for results, dtype, backend in ((got, torch.float32, "triton"), (want, torch.float64, "reference")):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out = rk.mixed_attention(*leaves, plan, softcap=softcap, scale=-0.3, backend=backend)
        results += [out.detach(), *torch.autograd.grad((out * out).sum(), leaves)]
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want):
        assert relative_error(a, b) <= GRADIENT[torch.float32], name
        if name in ("dk", "dv"):  # only the shared tile, whose error the others would hide
            assert relative_error(a[:64], b[:64]) <= GRADIENT[torch.float32], name


def test_a_scale_of_zero():
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[5, 30]]))
    v = torch.randn(35, 1, 16)
    out = rk.mixed_attention(v, v, v, plan, scale=0.0, backend="triton")
    assert relative_error(out, v.double().cumsum(0) / torch.arange(1, 36)[:, None, None]) <= OUTPUT[torch.float32]


@pytest.mark.parametrize("sinks", (False, True))
def test_refilled_buffers_of_a_capacity(sinks):
    """A launch replays on new plans in the same buffers; rows beyond a batch may have any values and get 0 and -inf."""
    capacity = rk.PlanCapacity.for_rows(192, sequences=4, ranges_per_block=8)
    logits = torch.tensor([0.3, -1.0]) if sinks else None
    plan, address = None, None
    for lengths in ([[40, 1, 1, 20], [70]], [[5]], [[16, 130], [3], [40]]):
        layout = rk.ChunkLayout.from_lengths(lengths)
        rows = layout.total_rows
        plan = rk.plan_attention(layout, capacity=capacity, out=plan)
        assert address in (None, plan.sizes.data_ptr())
        address = plan.sizes.data_ptr()
        q, k, v, grad = (torch.full((192, heads, 16), float("nan")) for heads in (2, 1, 1, 2))
        for tensor in (q, k, v, grad):
            tensor[:rows].normal_()
        leaves = [t.requires_grad_() for t in (q, k, v)]
        out, lse = rk.mixed_attention(*leaves, plan, sinks=logits, return_lse=True, backend="triton")
        grads = torch.autograd.grad(out, leaves, grad)
        exact = [t[:rows].detach().double().requires_grad_() for t in leaves]
        wide = None if logits is None else logits.double()
        want, want_lse = rk.mixed_attention(*exact, rk.plan_attention(layout), sinks=wide, return_lse=True)
        assert relative_error(out[:rows].detach(), want.detach()) < 2e-6
        assert relative_error(lse[:rows].detach(), want_lse.detach()) < 5e-6
        assert not out[rows:].any() and lse[rows:].isneginf().all()
        for a, b in zip(grads, torch.autograd.grad(want, exact, grad[:rows].double())):
            assert relative_error(a[:rows], b) < 8e-6 and not a[rows:].any()


def test_fully_masked_rows():
    layout = rk.ChunkLayout.from_lengths([[3, 20]])
    plan = rk.plan_attention(layout, rk.ChunkMask.from_dense(torch.tensor([[True, False], [False, False]])))
    q, k, v = (torch.randn(23, heads, 16, requires_grad=True) for heads in (2, 1, 1))
    out, lse = rk.mixed_attention(q, k, v, plan, return_lse=True, backend="triton")
    assert not out[3:].any() and lse[3:].isneginf().all() and lse[:3].isfinite().all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(grad.isfinite().all() and not grad[3:].any() for grad in grads)
    sinks = torch.tensor([0.5, -2.0])
    out, lse = rk.mixed_attention(q, k, v, plan, sinks=sinks, return_lse=True, backend="triton")
    assert not out[3:].any() and torch.allclose(lse[3:], sinks.expand(20, 2))


@pytest.mark.parametrize("lengths", [[[]], [[1]], [[], [1], []]])
def test_empty_and_single_rows(lengths):
    layout = rk.ChunkLayout.from_lengths(lengths)
    rows = layout.total_rows
    q, k, v = (torch.randn(rows, 2, 8, requires_grad=True) for _ in range(3))
    out = rk.mixed_attention(q, k, v, rk.plan_attention(layout), backend="triton")
    torch.testing.assert_close(out, v)
    out.sum().backward()
    # The probability of the only key is 2 to the power of a rounding error, not of 0.
    for grad, want in ((v.grad, 1.0), (q.grad, 0.0), (k.grad, 0.0)):
        assert torch.allclose(grad, torch.tensor(want), atol=1e-5)


@pytest.mark.parametrize("softcap", [2.0**-126, 1e20, 2.0**126])
def test_extreme_softcaps(softcap):
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[20]]))
    q, k, v = (torch.randn(20, 1, 16) for _ in range(3))
    got = rk.mixed_attention(q, k, v, plan, softcap=softcap, backend="triton")
    want = rk.mixed_attention(q.double(), k.double(), v.double(), plan, softcap=softcap)
    assert relative_error(got, want) < 2e-6


def test_extreme_scores_stay_finite():
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[40]]))
    q, k, v = (torch.randn(40, 1, 16) for _ in range(3))
    out, lse = rk.mixed_attention(q, k, v, plan, scale=1e4, return_lse=True, backend="triton")
    _, want = rk.mixed_attention(q.double(), k.double(), v.double(), plan, scale=1e4, return_lse=True)
    assert out.isfinite().all() and relative_error(lse, want) < 5e-6


def test_keys_far_into_a_tensor():
    """The rows of k and v are more than 2^31 elements apart, where int32 offsets would overflow."""
    rows, stride = 2, 2**31 + 8
    torch.utils.deterministic.fill_uninitialized_memory = False  # filling would touch all 8 GiB
    storage = torch.empty(rows * stride, dtype=torch.float16)
    k = storage.as_strided((rows, 1, 16), (stride, 16, 1))
    k.copy_(torch.randn(rows, 1, 16))
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[rows]]))
    out = rk.mixed_attention(k, k, k, plan, backend="triton")
    expected = rk.mixed_attention(*(k.clone(),) * 3, plan, backend="reference")
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-3)  # sums are rounded to float16 in a different order


def test_results_are_the_same_in_every_run():
    problem = problem_of(6, torch.float32)
    first, second = problem.run("triton"), problem.run("triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_opcheck():
    problem = problem_of(6, torch.float32)
    leaves = [t.detach().clone().requires_grad_() for t in (problem.q, problem.k, problem.v)]
    tensors = problem.plan_problem.plan().tensors()
    torch.library.opcheck(
        torch.ops.refrag.mixed_attention.default, (*leaves, tensors, 0.2, 0.0, None), {"backend": "triton"}
    )


def test_a_plan_without_tile_lists_is_refused():
    layout = rk.ChunkLayout.from_lengths([[4]])
    tensors = rk.plan_attention(layout).tensors()[: len(PlanField)]
    q = torch.randn(4, 1, 8)
    with pytest.raises(RuntimeError, match="a plan without tile lists"):
        torch.ops.refrag.mixed_attention(q, q, q, tensors, 1.0, 0.0, None, backend="triton")
