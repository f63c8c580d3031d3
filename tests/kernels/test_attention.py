"""mixed_attention: every backend and dtype against float64, and the op's integration with torch."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import refrag_kernels as rk
from refrag_kernels import backends
from tests.support.accuracy import DTYPES, GRADIENT, LSE, OUTPUT, relative_error
from tests.support.factory import random_attention_problem

BACKENDS = backends.available("mixed_attention", torch.device("cpu"))
SEEDS = range(24)


@functools.cache
def expected(seed, dtype):
    return random_attention_problem(seed, dtype).expected()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend, dtype, seed):
    problem = random_attention_problem(seed, dtype)
    for name, actual in problem.run(backend).items():
        bound = {"out": OUTPUT, "lse": LSE}.get(name, GRADIENT)[dtype]
        upstream = problem.grad_out if name.startswith("d") else None
        error = relative_error(actual, expected(seed, dtype)[name], upstream)
        assert error <= bound, (
            f"{name}: error {error:.2e}, allowed {bound:.0e}; random_attention_problem({seed}, {dtype})"
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_the_reference_in_float64(seed):
    problem = random_attention_problem(seed, torch.float64)
    for name, actual in problem.run("reference").items():
        error = relative_error(actual, expected(seed, torch.float64)[name], problem.grad_out)
        assert error <= 1e-12, f"{name}: error {error:.2e}; seed {seed}"


@pytest.mark.parametrize("seed", range(100, 106))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_worse_than_sdpa(backend, dtype, seed):
    problem = random_attention_problem(seed, dtype, plain=True)
    allowed = problem.plan_problem.allowed()
    sees = allowed.any(1)
    if not sees.any():
        return
    q, k, v = (t.transpose(0, 1)[None] for t in (problem.q, problem.k, problem.v))
    theirs = F.scaled_dot_product_attention(q, k, v, allowed, enable_gqa=True)[0].transpose(0, 1)[sees]
    want = problem.expected()["out"][sees]
    ours = problem.run(backend)["out"][sees]
    assert relative_error(ours, want) <= 1.2 * relative_error(theirs, want), f"seed {seed}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_beyond_the_batch_under_a_capacity_are_zero(backend, dtype):
    problem = random_attention_problem(1, dtype)
    capacity = rk.PlanCapacity.for_rows(1024, sequences=8, ranges_per_block=40)
    rows, keys = problem.q.shape[0], problem.k.shape[0]

    def padded(tensor, rows):
        return torch.cat([tensor, tensor.new_full((rows - tensor.shape[0], *tensor.shape[1:]), float("nan"))])

    q, k, v = padded(problem.q, 1024), padded(problem.k, 1024), padded(problem.v, 1024)
    plan = problem.plan_problem.plan(capacity=capacity)
    for tensor in (q, k, v):
        tensor.requires_grad_()
    out, lse = rk.mixed_attention(q, k, v, plan, return_lse=True, backend=backend, **problem.options)
    want = problem.run(backend)
    assert torch.equal(out[:rows], want["out"]) and torch.equal(lse[:rows], want["lse"])
    assert not out[rows:].any() and (problem.options["sinks"] is not None or lse[rows:].isneginf().all())
    grads = torch.autograd.grad(out[:rows], (q, k, v), problem.grad_out)
    for grad, count in zip(grads, (rows, keys, keys)):
        assert grad[:count].isfinite().all() and not grad[count:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_fully_masked_rows(backend):
    layout = rk.ChunkLayout.from_lengths([[3, 20]])
    mask = rk.ChunkMask.from_dense(torch.tensor([[True, False], [False, False]]))
    plan = rk.plan_attention(layout, mask)
    q, k, v = torch.randn(23, 2, 16), torch.randn(23, 1, 16), torch.randn(23, 1, 16)
    out, lse = rk.mixed_attention(q, k, v, plan, return_lse=True, backend=backend)
    assert not out[3:].any() and lse[3:].isneginf().all() and lse[:3].isfinite().all()
    sinks = torch.tensor([0.5, -2.0])
    out, lse = rk.mixed_attention(q, k, v, plan, sinks=sinks, return_lse=True, backend=backend)
    assert not out[3:].any() and torch.allclose(lse[3:], sinks.expand(20, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[[]], [[1]], [[], [1], []]])
def test_empty_and_single_rows(backend, lengths):
    layout = rk.ChunkLayout.from_lengths(lengths)
    rows = layout.total_rows
    q, k, v = (torch.randn(rows, 2, 8, requires_grad=True) for _ in range(3))
    out = rk.mixed_attention(q, k, v, rk.plan_attention(layout), backend=backend)
    torch.testing.assert_close(out, v)
    out.sum().backward()
    torch.testing.assert_close(v.grad, torch.ones(rows, 2, 8))
    assert not q.grad.any() and not k.grad.any()


@pytest.mark.parametrize("scale", [1e4, 1e-4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_scores_stay_finite(backend, scale):
    layout = rk.ChunkLayout.from_lengths([[40]])
    q, k, v = (torch.randn(40, 1, 16) for _ in range(3))
    out, lse = rk.mixed_attention(q, k, v, rk.plan_attention(layout), scale=scale, return_lse=True, backend=backend)
    want, want_lse = rk.mixed_attention(
        q.double(), k.double(), v.double(), rk.plan_attention(layout), scale=scale, return_lse=True
    )
    # A float32 score of 1e5 has a rounding error of 1e-2, so probabilities can't be exact, but the lse can.
    assert out.isfinite().all() and relative_error(lse, want_lse) < 5e-6
    if scale < 1:
        assert relative_error(out, want) < 2e-6


def test_gradcheck():
    layout = rk.ChunkLayout.from_lengths([[5, 1, 1, 9], [7]])
    plan = rk.plan_attention(layout, rk.ChunkMask.passages([-1, 0, 1, -1, 0]))
    rows = layout.total_rows
    q, k, v = (torch.randn(rows, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def call(q, k, v, sinks):
        return rk.mixed_attention(q, k, v, plan, softcap=2.0, sinks=sinks, return_lse=True)

    assert torch.autograd.gradcheck(call, (q, k, v, sinks))


def test_a_second_derivative_raises():
    problem = random_attention_problem(3, torch.float32)
    q = problem.q.detach().requires_grad_()
    out = rk.mixed_attention(q, problem.k, problem.v, problem.plan_problem.plan())
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="mixed_attention_backward can't be differentiated"):
        grad.sum().backward()


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_opcheck(backend, sinks):
    problem = random_attention_problem(5, torch.float32)
    leaves = [t.detach().clone().requires_grad_() for t in (problem.q, problem.k, problem.v)]
    logits = torch.randn(problem.q.shape[1], requires_grad=True) if sinks else None
    tensors = problem.plan_problem.plan().tensors()
    torch.library.opcheck(
        torch.ops.refrag.mixed_attention.default, (*leaves, tensors, 0.2, 0.0, logits), {"backend": backend}
    )
    q, k, v = (t.detach() for t in leaves)
    out, lse = torch.ops.refrag.mixed_attention(q, k, v, tensors, 0.2, 0.0, logits, backend=backend)
    args = (torch.randn_like(out), torch.randn_like(lse), q, k, v, out.detach(), lse.detach())
    logits = None if logits is None else logits.detach()
    torch.library.opcheck(
        torch.ops.refrag.mixed_attention_backward.default,
        (*args, tensors, 0.2, 0.0, logits),
        {"backend": backend},
    )


@pytest.mark.compiles
def test_twenty_layouts_compile_at_most_twice():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def layer(q, k, v, plan):
        return rk.mixed_attention(q * 2, k, v, plan, return_lse=True)

    compiled = 0
    for seed in range(200, 240):
        problem = random_attention_problem(seed, torch.float32, max_sequences=5)
        rows, keys = problem.q.shape[0], problem.k.shape[0]
        # torch.compile specializes the sizes 0 and 1, and equal numbers of keys and rows.
        if rows < 2 or rows != keys:
            continue
        compiled += 1
        q, k, v = torch.randn(rows, 4, 16), torch.randn(keys, 2, 16), torch.randn(keys, 2, 16)
        q, k, v = (t.requires_grad_() for t in (q, k, v))
        plan = problem.plan_problem.plan()
        out, lse = layer(q, k, v, plan)
        want, want_lse = rk.mixed_attention(q * 2, k, v, plan, return_lse=True)
        torch.testing.assert_close((out, lse), (want, want_lse))
        for a, b in zip(torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(want.sum(), (q, k, v))):
            torch.testing.assert_close(a, b)
    assert compiled >= 20 and counter.frame_count <= 2


@pytest.mark.compiles
def test_compiles_with_inductor():
    problem = random_attention_problem(5, torch.float32)
    plan = problem.plan_problem.plan()
    call = torch.compile(lambda q, k, v: rk.mixed_attention(q + 1, k, v, plan) * 2, fullgraph=True)
    torch.testing.assert_close(
        call(problem.q, problem.k, problem.v), rk.mixed_attention(problem.q + 1, problem.k, problem.v, plan) * 2
    )


def test_exports_with_the_plan_as_an_input():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v, plan):
            return rk.mixed_attention(q, k, v, plan)

    problem = random_attention_problem(5, torch.float32)
    args = (problem.q, problem.k, problem.v, problem.plan_problem.plan())
    program = torch.export.export(Layer(), args)
    assert any(node.target == torch.ops.refrag.mixed_attention.default for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*args), Layer()(*args))


def test_activation_checkpointing():
    problem = random_attention_problem(5, torch.float32)
    plan = problem.plan_problem.plan()
    q = problem.q.detach().requires_grad_()

    def call(q):
        return rk.mixed_attention(q, problem.k, problem.v, plan)

    (want,) = torch.autograd.grad(call(q).sum(), q)
    (got,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(call, q, use_reentrant=False).sum(), q)
    assert torch.equal(got, want)


def test_autocast():
    problem = random_attention_problem(5, torch.float32)
    plan, sinks = problem.plan_problem.plan(), torch.randn(problem.q.shape[1])
    q, k, v = problem.q, problem.k, problem.v
    leaf = q.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = rk.mixed_attention(leaf, k.bfloat16(), v, plan, sinks=sinks, return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    want = rk.mixed_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), plan, sinks=sinks)
    assert torch.equal(out, want)
    out.float().sum().backward()
    assert leaf.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_do_not_depend_on_the_thread_count(backend):
    problem = random_attention_problem(7, torch.float32)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(problem.run(backend))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        for name, tensor in run.items():
            assert torch.equal(tensor, runs[0][name]) or backend == "reference", name


rows = 12
plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[4, 4], [4]]))
q, kv = torch.randn(rows, 4, 16), torch.randn(rows, 2, 16)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((q, kv[:, [0, 0, 1]], kv[:, [0, 0, 1]]), {}, ValueError, "q: got 4 heads, needs a multiple of the 3"),
        ((kv[:, :, :12],) * 3, {}, ValueError, "q: got head_dim 12, needs a multiple of 8 up to 256"),
        ((torch.randn(rows, 1, 264),) * 3, {}, ValueError, "head_dim 264"),
        ((q, kv.half(), kv), {}, TypeError, "k: got dtype float16, needs float32, the dtype of q"),
        ((q.int(), kv, kv), {}, TypeError, "q: got dtype int32, needs float32 or bfloat16"),
        ((q, kv.to("meta"), kv), {}, ValueError, "k: got device meta, needs cpu, the device of q"),
        ((q, kv, torch.randn(rows, 16, 2).transpose(1, 2)), {}, ValueError, "v: got stride 2 in its last dimension"),
        ((q, kv, kv[:, :1]), {}, ValueError, r"v: got shape \[12, 1, 16\], needs \[12, 2, 16\]"),
        ((q[None], kv, kv), {}, ValueError, r"q: got shape \[1, 12, 4, 16\], needs \[T_q, H_q, D\]"),
        ((torch.cat([q, q[:1]]), kv, kv), {}, ValueError, "needs one for the 13 rows passed"),
        ((q[:11], kv, kv), {}, ValueError, "plan: got a plan for 12 rows of q, needs one for the 11 rows passed"),
        ((q, kv[:10], kv[:10]), {}, ValueError, "plan: got a plan for 12 rows of k, needs one for the 10 rows passed"),
        ((q, kv, kv), {"sinks": torch.zeros(3)}, ValueError, r"sinks: got shape \[3\], needs \[4\]"),
        ((q, kv, kv), {"sinks": torch.zeros(4).half()}, TypeError, "sinks: got dtype float16, needs float32"),
        ((q, kv, kv), {"softcap": -1.0}, ValueError, "softcap: got -1.0"),
        ((q, kv, kv), {"backend": "tensorrt"}, ValueError, "unknown backend 'tensorrt'"),
        ((q, kv, kv), {"backend": "triton"}, RuntimeError, "no allowed backend can serve refrag::mixed_attention"),
    ],
)  # fmt: skip
def test_bad_input(args, options, error, message):
    with pytest.raises(error, match=message):
        rk.mixed_attention(*args, plan, **options)


def test_a_plan_of_another_type_is_refused():
    with pytest.raises(TypeError, match="plan: got list, needs an AttentionPlan"):
        rk.mixed_attention(q, kv, kv, plan.tensors())


@pytest.mark.compiles
def test_bad_shapes_are_refused_under_compile_too():
    op = torch.ops.refrag.mixed_attention
    tensors = plan.tensors()
    call = torch.compile(lambda q, k, v: op(q, k, v, tensors, 1.0, 0.0, None, backend=None)[0], backend="eager")
    with pytest.raises(Exception, match="plan: got a plan for 12 rows of q"):
        call(q[:11], kv, kv)
