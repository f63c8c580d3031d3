"""Tests specific to the C++ attention: instruction sets, threads, and memory access."""

import random

import pytest
import torch

import refrag_kernels as rk
from tests.support.accuracy import DTYPES, GRADIENT, LSE, OUTPUT, relative_error
from tests.support.factory import random_attention_problem, random_plan_problem
from tests.support.instruction_sets import LOWER, run_on
from tests.support.plan_bruteforce import plan_tensors


def check(problem, dtype, label):
    expected = problem.expected()
    for name, actual in problem.run("cpu").items():
        bound = {"out": OUTPUT, "lse": LSE}.get(name, GRADIENT)[dtype]
        error = relative_error(actual, expected[name], problem.grad_out if name.startswith("d") else None)
        assert error <= bound, f"{name}: error {error:.2e}, allowed {bound:.0e}; {label}"


def expanded_heads(rows, dtype):
    base = torch.randn(rows, 2, 24).to(dtype)
    return base[:, :1].expand(rows, 2, 24), base


def expanded_rows(rows, dtype):
    base = torch.randn(rows, 2, 24).to(dtype)
    return base[:1].expand(rows, 2, 24), base


def every_other_head(rows, dtype):
    heads = torch.randn(rows, 6, 24).to(dtype)
    return heads[:, 0:4:2], heads[:, 0:2]


# Keys and values that start at the same address and differ in their strides.
VIEWS = {views.__name__: views for views in (expanded_heads, expanded_rows, every_other_head)}


def check_views_of_one_storage(name, dtype):
    torch.manual_seed(0)
    rows = 70
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[40, 30]]))
    q, grad_out = torch.randn(2, rows, 4, 24).to(dtype)
    k, v = VIEWS[name](rows, dtype)

    def call(*tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = rk.mixed_attention(*leaves, plan, backend="cpu")
        return [out, *torch.autograd.grad(out, leaves, grad_out)]

    for keys, values in ((k, v), (v, k)):
        want = call(q, *(t.clone(memory_format=torch.contiguous_format) for t in (keys, values)))
        assert all(torch.equal(a, b) for a, b in zip(want, call(q, keys, values))), (name, dtype)


def check_all():
    """Check all problems. Run in a new process, since the instruction set is chosen once per process."""
    for dtype in DTYPES:
        for seed in range(12):
            check(random_attention_problem(seed, dtype), dtype, f"random_attention_problem({seed}, {dtype})")
        for name in VIEWS:
            check_views_of_one_storage(name, dtype)


@pytest.mark.parametrize("isa", LOWER)
def test_instruction_sets(isa):
    run_on(isa, __name__, "check_all")


def run(q, k, v, plan, grad_out, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out, lse = rk.mixed_attention(*leaves, plan, return_lse=True, backend="cpu", **options)
    seen = lse.isfinite()
    return [
        out.detach(),
        lse.detach(),
        *torch.autograd.grad((out, lse[seen].sum()), leaves, (grad_out, torch.ones(()))),
    ]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads(threads, dtype):
    torch.manual_seed(0)
    layout = rk.ChunkLayout.from_lengths([[64, *[16] * 20, 40], [200, 1, 1, 7], [300]])
    plan = rk.plan_attention(layout, rk.ChunkMask.passages(torch.arange(layout.num_chunks) % 5 - 1))
    q, grad_out = torch.randn(2, layout.total_rows, 6, 64).to(dtype)
    k, v = torch.randn(2, layout.total_rows, 2, 64).to(dtype)
    results = []
    for count in (1, 2, 3, 5, 2):
        torch.set_num_threads(count)
        results.append(run(q, k, v, plan, grad_out, sinks=torch.arange(6.0)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 24, 40, 72, 104, 136, 256])
@pytest.mark.parametrize("heads", [(1, 1), (7, 1), (5, 5), (24, 2)], ids=str)
def test_head_dims_and_groups(head_dim, heads, dtype):
    torch.manual_seed(head_dim)
    layout = rk.ChunkLayout.from_lengths([[3, 20, 1, 16], [5], [33]])
    plan = rk.plan_attention(layout)
    q, grad_out = torch.randn(2, layout.total_rows, heads[0], head_dim).to(dtype)
    k, v = torch.randn(2, layout.total_rows, heads[1], head_dim).to(dtype)
    want = rk.mixed_attention(q.double(), k.double(), v.double(), plan, return_lse=True)
    out, lse, *grads = run(q, k, v, plan, grad_out)
    assert relative_error(out, want[0]) <= OUTPUT[dtype] and relative_error(lse, want[1]) <= LSE[dtype]
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    want = rk.mixed_attention(*leaves, plan, return_lse=True)
    for actual, expected in zip(
        grads, torch.autograd.grad((want[0], want[1].sum()), leaves, (grad_out.double(), None))
    ):
        assert relative_error(actual, expected, grad_out) <= GRADIENT[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_change_nothing(dtype):
    torch.manual_seed(0)
    rows, head_dim = 77, 40
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[40, 37]]))
    q, grad_out = torch.randn(2, rows, 4, head_dim).to(dtype)
    k, v = torch.randn(2, rows, 2, head_dim).to(dtype)

    def apart(tensor):  # odd strides and offset, NaN in between
        room = torch.full((rows, tensor.shape[1] + 2, head_dim + 3), float("nan"), dtype=dtype)
        room[:, 1:-1, 1 : 1 + head_dim] = tensor
        return room[:, 1:-1, 1 : 1 + head_dim]

    def heads_first(tensor):
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)

    def call(*tensors):
        leaves = [t.requires_grad_() for t in tensors[:3]]
        out = rk.mixed_attention(*leaves, plan, backend="cpu")
        return [out, *torch.autograd.grad(out, leaves, tensors[3])]

    want = call(q, k, v, grad_out)
    for other in (apart, heads_first):
        got = call(*(other(t.detach()) for t in (q, k, v, grad_out)))
        assert all(torch.equal(a, b) for a, b in zip(want, got)), other.__name__


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VIEWS)
def test_views_of_one_storage(name, dtype):
    check_views_of_one_storage(name, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_beyond_the_batch(dtype):
    torch.manual_seed(0)
    layout = rk.ChunkLayout.from_lengths([[30, 16, 50]])
    rows, room = layout.total_rows, 160
    mask = rk.ChunkMask.passages(torch.tensor([0, 1, 0]))
    capacity = rk.PlanCapacity.for_rows(room, sequences=3)
    q, grad_out = torch.randn(2, room, 4, 32).to(dtype)
    k, v = torch.randn(2, room, 2, 32).to(dtype)
    exact = run(q[:rows], k[:rows], v[:rows], rk.plan_attention(layout, mask), grad_out[:rows])
    for tensor in (q, k, v, grad_out):
        tensor[rows:] = float("nan")
    out, lse, *grads = run(q, k, v, rk.plan_attention(layout, mask, capacity=capacity), grad_out)
    assert all(torch.equal(a[:rows], b) for a, b in zip((out, lse, *grads), exact))
    assert lse[rows:].isneginf().all() and not any(t[rows:].any() for t in (out, *grads))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_skipped_tile_is_not_read(dtype):
    torch.manual_seed(0)
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[32, 32]]), rk.ChunkMask.diagonal())
    q = torch.randn(64, 2, 16).to(dtype)
    k, v = torch.randn(2, 64, 2, 16).to(dtype)
    k[32:], v[32:] = float("nan"), float("inf")
    out, lse = rk.mixed_attention(q, k, v, plan, return_lse=True, backend="cpu")
    assert out[:32].isfinite().all() and lse[:32].isfinite().all()
    assert out[32:].isnan().all()  # NaN that a row attends to is not hidden


@pytest.mark.parametrize("seed", range(40))
def test_the_planner_against_brute_force(seed):
    problem = random_plan_problem(random.Random(seed))
    offsets = [t.sequence_offsets.tolist() for t in (problem.layout, problem.keys)]
    want = plan_tensors(problem.allowed(), *offsets)
    plan = problem.plan()
    for name, expected in want.items():
        got = getattr(plan, name)
        assert torch.equal(got[: len(expected)], expected), f"random_plan_problem(random.Random({seed}))"
