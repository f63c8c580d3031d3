"""attention_received: every backend and dtype against float64, and the op's integration with torch."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import refrag_kernels as rk
from refrag_kernels import backends
from tests.support.accuracy import DTYPES, LSE, relative_error
from tests.support.factory import random_attention_problem
from tests.support.instruction_sets import LOWER, run_on
from tests.support.nonfinite import spoilt_problem

BACKENDS = backends.available("attention_received", torch.device("cpu"))
SEEDS = range(24)


def lse_of(problem, plan):
    """Return the lse of the specification, in the dtype that the op takes."""
    _, lse = rk.mixed_attention(
        problem.q, problem.k, problem.v, plan, return_lse=True, backend="reference", **problem.options
    )
    return lse


def received(problem, backend, **plan_options):
    plan = problem.plan_problem.plan(**plan_options)
    options = {name: problem.options[name] for name in ("scale", "softcap")}
    return rk.attention_received(problem.q, problem.k, lse_of(problem, plan), plan, backend=backend, **options)


def column_sums(problem):
    """Return the column sums of a dense softmax in float64."""
    q, k, sinks = problem.q.double(), problem.k.double(), problem.options["sinks"]
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(group, 1))
    scores = scores * (problem.options["scale"] or q.shape[-1] ** -0.5)
    if problem.options["softcap"]:
        scores = problem.options["softcap"] * torch.tanh(scores / problem.options["softcap"])
    scores = scores.masked_fill(~problem.plan_problem.allowed(), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, q.shape[0], 1)], 2)
    probabilities = scores.softmax(2).nan_to_num(0)[:, :, : k.shape[0]]
    return probabilities.sum(1).unflatten(0, (-1, group)).sum(1).T


@functools.cache
def expected(seed, dtype):
    return column_sums(random_attention_problem(seed, dtype))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend, dtype, seed):
    problem = random_attention_problem(seed, dtype)
    got = received(problem, backend)
    assert got.dtype == torch.float32 and got.is_contiguous()
    error = relative_error(got, expected(seed, dtype))
    assert error <= LSE[dtype], f"error {error:.2e}; random_attention_problem({seed}, {dtype})"


@pytest.mark.parametrize("seed", SEEDS)
def test_the_reference_in_float64(seed):
    got = received(random_attention_problem(seed, torch.float64), "reference")
    assert got.dtype == torch.float64 and relative_error(got, expected(seed, torch.float64)) <= 1e-12, f"seed {seed}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_row_and_head_gives_one(backend):
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[70, 1, 1, 50], [33]]))
    q, k, v = torch.randn(155, 6, 32), torch.randn(155, 2, 32), torch.randn(155, 2, 32)
    _, lse = rk.mixed_attention(q, k, v, plan, return_lse=True)
    got = rk.attention_received(q, k, lse, plan, backend=backend)
    torch.testing.assert_close(got[:122].sum(0), torch.full((2,), 122 * 3.0))
    torch.testing.assert_close(got[122:].sum(0), torch.full((2,), 33 * 3.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_sequence(backend):
    """Many blocks of rows attend to each key, and their parts are added up."""
    lengths = [[700, *[1] * 40, 500]]
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths(lengths))
    q, k, v = torch.randn(1240, 2, 16), torch.randn(1240, 1, 16), torch.randn(1240, 1, 16)
    wide = [tensor.double() for tensor in (q, k, v)]
    _, lse = rk.mixed_attention(*wide, plan, return_lse=True)
    want = rk.attention_received(*wide[:2], lse, plan)
    got = rk.attention_received(q, k, lse.float(), plan, backend=backend)
    assert relative_error(got, want) <= 5e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_beyond_the_batch_under_a_capacity_are_zero(backend, dtype):
    problem = random_attention_problem(1, dtype)
    want = received(problem, backend)

    def padded(tensor):
        return torch.cat([tensor, tensor.new_full((1024 - len(tensor), *tensor.shape[1:]), float("nan"))])

    problem.q, problem.k, problem.v = (padded(tensor) for tensor in (problem.q, problem.k, problem.v))
    got = received(problem, backend, capacity=rk.PlanCapacity.for_rows(1024, sequences=8, ranges_per_block=40))
    assert relative_error(got[: len(want)], want) <= LSE[dtype] and not got[len(want) :].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_and_keys(backend):
    layout = rk.ChunkLayout.from_lengths([[3, 20]])
    plan = rk.plan_attention(layout, rk.ChunkMask.from_dense(torch.tensor([[True, False], [False, False]])))
    q, k = torch.randn(23, 2, 16), torch.randn(23, 1, 16)
    _, lse = rk.mixed_attention(q, k, k, plan, return_lse=True)
    got = rk.attention_received(q, k, lse, plan, backend=backend)
    assert torch.allclose(got[:3].sum(), torch.tensor(6.0)) and not got[3:].any()
    # A row whose lse is -inf contributes nothing, though the plan allows its keys.
    lse[1] = float("-inf")
    assert torch.allclose(rk.attention_received(q, k, lse, plan, backend=backend).sum(), torch.tensor(4.0))
    full = rk.plan_attention(rk.ChunkLayout.from_lengths([[40]]), causal=False)
    q, k = torch.randn(40, 2, 16), torch.randn(40, 1, 16)
    lse = torch.full((40, 2), float("-inf"))
    assert not rk.attention_received(q, k, lse, full, backend=backend).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[[]], [[1]], [[], [1], []]])
def test_empty_and_single_rows(backend, lengths):
    layout = rk.ChunkLayout.from_lengths(lengths)
    rows = layout.total_rows
    q, k = torch.randn(rows, 2, 8), torch.randn(rows, 2, 8)
    plan = rk.plan_attention(layout)
    _, lse = rk.mixed_attention(q, k, k, plan, return_lse=True)
    torch.testing.assert_close(rk.attention_received(q, k, lse, plan, backend=backend), torch.ones(rows, 2))


def test_rows_far_apart(monkeypatch):
    """Row 39 starts 39 * 2^26 elements into the queries and keys, of whose memory little is touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[40]]), causal=False)
    near = torch.randn(40, 2, 16), torch.randn(40, 1, 16)
    far = [torch.empty(39 * 2**26 + 32).as_strided(tensor.shape, (2**26, 16, 1)).copy_(tensor) for tensor in near]
    _, lse = rk.mixed_attention(*near, near[1], plan, return_lse=True)
    want = rk.attention_received(*near, lse, plan, backend="cpu")
    assert torch.equal(rk.attention_received(*far, lse, plan, backend="cpu"), want)


def check_nonfinite(problem, backend):
    """A NaN or inf in q or k spoils its rows' probabilities, and so the sums of the keys that those attend to."""
    got, want = received(problem.spoilt, backend), received(problem.spoilt, "reference")
    assert torch.equal(got.isfinite(), want.isfinite())
    reached = (problem.clean.plan_problem.allowed().T[:, :, None] & problem.rows).any(1)
    reached = reached.unflatten(1, (got.shape[1], -1)).any(2)
    assert torch.equal(got[~reached], received(problem.clean, backend)[~reached])


@pytest.mark.parametrize("first_seed", range(0, 40, 10))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nonfinite_elements_reach_only_their_rows_keys(backend, dtype, first_seed):
    for seed in range(first_seed, first_seed + 10):
        try:
            check_nonfinite(spoilt_problem(seed, dtype), backend)
        except AssertionError as error:
            raise AssertionError(f"spoilt_problem({seed}, {dtype}): {error}") from error


def check_all():
    """Check the CPU's kernels. Run in a new process, since the instruction set is chosen once per process."""
    for dtype in DTYPES:
        for seed in range(12):
            test_against_float64("cpu", dtype, seed)
            check_nonfinite(spoilt_problem(seed, dtype), "cpu")
    test_masked_rows_and_keys("cpu")
    test_a_long_sequence("cpu")


@pytest.mark.parametrize("isa", LOWER)
def test_instruction_sets(isa):
    run_on(isa, __name__, "check_all")


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_opcheck(backend):
    problem = random_attention_problem(5, torch.float32)
    plan = problem.plan_problem.plan()
    args = (problem.q, problem.k, lse_of(problem, plan), plan.tensors(), 0.2, 0.0)
    torch.library.opcheck(torch.ops.refrag.attention_received.default, args, {"backend": backend})


@pytest.mark.compiles
def test_layouts_compile_at_most_twice():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def layer(q, k, v, plan):
        out, lse = rk.mixed_attention(q * 2, k, v, plan, return_lse=True)
        return out, rk.attention_received(q * 2, k, lse, plan)

    for rows in range(20, 30):
        plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[rows - 9, 1, 1, 7]]))
        q, k, v = torch.randn(rows, 4, 16), torch.randn(rows, 2, 16), torch.randn(rows, 2, 16)
        _, lse = rk.mixed_attention(q * 2, k, v, plan, return_lse=True)
        torch.testing.assert_close(layer(q, k, v, plan)[1], rk.attention_received(q * 2, k, lse, plan))
    assert counter.frame_count <= 2


def test_autocast_and_no_gradient():
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[20]]))
    q, k = torch.randn(20, 2, 16), torch.randn(20, 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        _, lse = rk.mixed_attention(q, k, k, plan, return_lse=True)
        got = rk.attention_received(q, k.bfloat16(), lse, plan)
    assert torch.equal(got, rk.attention_received(q.bfloat16(), k.bfloat16(), lse, plan))
    with pytest.raises(RuntimeError, match="attention_received can't be differentiated"):
        rk.attention_received(q.requires_grad_(), k, lse, plan).sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_do_not_depend_on_the_thread_count(backend):
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[300, 1, 1, 200]]))
    q, k = torch.randn(502, 4, 32), torch.randn(502, 2, 32)
    _, lse = rk.mixed_attention(q, k, k, plan, return_lse=True)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(rk.attention_received(q, k, lse, plan, backend=backend))
    finally:
        torch.set_num_threads(before)
    assert backend == "reference" or all(torch.equal(results[0], other) for other in results[1:])


rows = 12
plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[4, 4], [4]]))
q, k, lse = torch.randn(rows, 4, 16), torch.randn(rows, 2, 16), torch.zeros(rows, 4)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((q, k[:, [0, 0, 1]], lse), {}, ValueError, "q: got 4 heads, needs a multiple of the 3"),
        ((q[..., :12], k[..., :12], lse), {}, ValueError, "q: got head_dim 12, needs a multiple of 8 up to 256"),
        ((q, k.half(), lse), {}, TypeError, "k: got dtype float16, needs float32, the dtype of q"),
        ((q.int(), k, lse), {}, TypeError, "q: got dtype int32, needs float32 or bfloat16"),
        ((q, k.to("meta"), lse), {}, ValueError, "k: got device meta, needs cpu, the device of q"),
        ((q, torch.randn(rows, 16, 2).mT, lse), {}, ValueError, "k: got stride 2 in its last dimension"),
        ((q[:11], k, lse[:11]), {}, ValueError, "plan: got a plan for 12 rows of q, needs one for the 11 rows passed"),
        ((q, k[:10], lse), {}, ValueError, "plan: got a plan for 12 rows of k, needs one for the 10 rows passed"),
        ((q, k, lse[:, :2]), {}, ValueError, r"lse: got shape \[12, 2\], needs \[12, 4\]"),
        ((q, k, lse.half()), {}, TypeError, "lse: got dtype float16, needs float32"),
        ((q.double(), k.double(), lse), {}, TypeError, "lse: got dtype float32, needs float64"),
        ((q, k, torch.zeros(4, rows).T), {}, ValueError, r"lse: got strides \[1, 12\], needs a contiguous tensor"),
        ((q, k, lse), {"softcap": -1.0}, ValueError, "softcap: got -1.0"),
        ((q, k, lse), {"scale": float("inf")}, ValueError, "scale: got inf"),
        ((q, k, lse), {"backend": "triton"}, RuntimeError, "no allowed backend can serve refrag::attention_received"),
    ],
)  # fmt: skip
def test_bad_input(args, options, error, message):
    with pytest.raises(error, match=message):
        rk.attention_received(*args, plan, **options)
    with pytest.raises(TypeError, match="plan: got list, needs an AttentionPlan"):
        rk.attention_received(q, k, lse, plan.tensors())
