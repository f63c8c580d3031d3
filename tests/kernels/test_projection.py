"""project_chunks and embed_mixed: every backend and dtype against float64, and the ops' integration with torch."""

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F

import refrag_kernels as rk
from refrag_kernels import backends
from tests.support.accuracy import DTYPES, GRADIENT, OUTPUT, relative_error
from tests.support.factory import random_lengths
from tests.support.instruction_sets import LOWER, run_on

BACKENDS = backends.available("embed_mixed", torch.device("cpu"))
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "none": lambda x: x,
}
SEEDS = range(18)


@pytest.fixture(autouse=True)
def soil_the_kernels_memory():
    """Fill the scratch memory that the C++ kernels keep between calls with NaN, as conftest does for torch's."""
    nan = torch.full((256, 512), float("nan"))
    rk.project_chunks(nan, nan, nan[0, :256], nan[:, :256], nan[0, :256])


@dataclasses.dataclass
class Problem:
    """Arguments of embed_mixed, which include those of project_chunks."""

    token_ids: torch.Tensor
    slot_of_row: torch.Tensor
    tensors: dict[str, torch.Tensor | None]  # token_table, chunks, w1, b1, w2, b2
    activation: str
    token_scale: float

    def embed(self, tensors, **options):
        t = tensors
        return rk.embed_mixed(
            self.token_ids, t["token_table"], t["chunks"], self.slot_of_row, t["w1"], t["b1"], t["w2"], t["b2"],
            activation=self.activation, token_scale=self.token_scale, **options,
        )  # fmt: skip

    def project(self, tensors, **options):
        weights = (tensors[name] for name in ("w1", "b1", "w2", "b2"))
        return rk.project_chunks(tensors["chunks"], *weights, activation=self.activation, **options)

    def expected_project(self, t):
        return F.linear(ACTIVATIONS[self.activation](F.linear(t["chunks"], t["w1"], t["b1"])), t["w2"], t["b2"])

    def expected_embed(self, t):
        projected = self.expected_project(t)
        rows = [
            projected[slot] if slot >= 0 else t["token_table"][token] * self.token_scale
            for token, slot in zip(self.token_ids.tolist(), self.slot_of_row.tolist())
        ]
        return torch.stack(rows) if rows else projected[:0]


def random_problem(seed: int, dtype: torch.dtype) -> Problem:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    rows, chunks = rng.choice([0, 1, 5, 40, 90]), rng.choice([0, 1, 3, 17, 70])
    # Kernels read sizes that are multiples of 8 in place; other sizes, odd ones in particular, need padded copies.
    d_enc, hidden, d_dec = rng.choice([1, 8, 24, 33, 96]), rng.choice([16, 37, 40, 144]), rng.choice([24, 97, 136, 150])
    pad = rng.choice([0, 0, 1, 8])

    def matrix(*shape, scale=1.0):
        *outer, last = shape
        storage = torch.full((*outer, last + pad), float("nan"), dtype=dtype)  # the padding is never used
        storage[..., :last] = torch.randn(shape, generator=generator) * scale
        return storage[..., :last]

    slots = torch.randint(-1, max(chunks, 1), (rows,), generator=generator, dtype=torch.int32)
    if chunks == 0 or rng.random() < 0.2:
        slots.fill_(-1)
    ids = torch.randint(0, 11, (rows,), generator=generator)
    ids[slots >= 0] = rng.choice([-1, 0, 2**40])  # ignored in slots
    tensors = {
        "token_table": matrix(11, d_dec),
        "chunks": matrix(chunks, d_enc),
        "w1": matrix(hidden, d_enc, scale=d_enc**-0.5),
        "b1": matrix(hidden) if rng.random() < 0.7 else None,
        "w2": matrix(d_dec, hidden, scale=hidden**-0.5),
        "b2": matrix(d_dec) if rng.random() < 0.7 else None,
    }
    return Problem(ids, slots, tensors, rng.choice(list(ACTIVATIONS)), rng.choice([1.0, 1.0, 11.3]))


def leaves(tensors, dtype=None):
    return {
        name: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for name, t in tensors.items()
    }


@pytest.mark.parametrize("call", ["embed", "project"])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend, dtype, seed, call):
    if dtype == torch.float64 and backend != "reference":
        return
    problem = random_problem(seed, dtype)
    wide, narrow = leaves(problem.tensors, torch.float64), leaves(problem.tensors)
    want = getattr(problem, f"expected_{call}")(wide)
    got = getattr(problem, call)(narrow, backend=backend)
    label = f"random_problem({seed}, {dtype})"
    assert relative_error(got.detach(), want.detach()) <= OUTPUT[dtype], label
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    used = [n for n in wide if wide[n] is not None and (call == "embed" or n != "token_table")]
    grads = torch.autograd.grad(got, [narrow[n] for n in used], upstream)
    wants = torch.autograd.grad(want, [wide[n] for n in used], upstream.double(), allow_unused=True)
    for name, grad, expected in zip(used, grads, wants):
        expected = torch.zeros_like(wide[name]) if expected is None else expected
        error = relative_error(grad, expected, upstream)
        # With one column, the gradient is a sum of terms that a GPU rounds first, so it may suffer cancellation.
        rounded = backend not in ("cpu", "reference") and dtype in (torch.bfloat16, torch.float16)
        bound = GRADIENT[dtype] * (4 if rounded and name == "chunks" and wide[name].shape[1] == 1 else 1)
        assert error <= bound, f"{name}: error {error:.2e}; {label}"


def check_all():
    """Check all problems. Run in a new process, since the instruction set is chosen once per process."""
    for dtype in DTYPES:
        for seed in range(40):
            problem = random_problem(seed, dtype)
            wide = {name: None if t is None else t.double() for name, t in problem.tensors.items()}
            error = relative_error(problem.embed(problem.tensors, backend="cpu"), problem.expected_embed(wide))
            assert error <= OUTPUT[dtype], f"error {error:.2e}; random_problem({seed}, {dtype})"
            layout = rk.ChunkLayout.from_lengths(random_lengths(random.Random(seed)))
            hidden = torch.randn(layout.total_rows, 33).to(dtype)
            want = rk.pool_chunks(hidden.double(), layout.chunk_offsets, "mean")
            got = rk.pool_chunks(hidden, layout.chunk_offsets, "mean", backend="cpu")
            assert relative_error(got, want) <= OUTPUT[dtype], f"pool_chunks; seed {seed}, {dtype}"


@pytest.mark.parametrize("isa", LOWER)
def test_instruction_sets(isa):
    run_on(isa, __name__, "check_all")


@pytest.mark.parametrize("widths", [(0, 5, 3), (4, 0, 3), (4, 5, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_of_no_width_leave_the_bias(backend, dtype, widths):
    d_enc, hidden, d_dec = widths
    b2 = torch.randn(d_dec).to(dtype)
    args = (torch.zeros(20, d_enc), torch.zeros(hidden, d_enc), None, torch.ones(d_dec, hidden))
    assert torch.equal(
        rk.project_chunks(*(t if t is None else t.to(dtype) for t in args), b2, backend=backend), b2.expand(20, d_dec)
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_worse_than_linear(backend, dtype, seed):
    problem = random_problem(200 + seed, dtype)
    if not problem.tensors["chunks"].shape[0]:
        return
    wide = {name: None if t is None else t.double() for name, t in problem.tensors.items()}
    want = problem.expected_project(wide)
    theirs = relative_error(problem.expected_project(problem.tensors), want)
    assert relative_error(problem.project(problem.tensors, backend=backend), want) <= 1.2 * theirs, f"seed {seed}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_weights_give_the_same_bits(backend, seed, dtype):
    problem = random_problem(seed, dtype)
    t = problem.tensors
    packed = rk.PackedProjection.from_weights(t["w1"], t["b1"], t["w2"], t["b2"], problem.activation)
    got = rk.project_chunks(t["chunks"], packed, backend=backend)
    assert torch.equal(got, problem.project(t, backend=backend))
    options = {"token_scale": problem.token_scale, "backend": backend}
    got = rk.embed_mixed(problem.token_ids, t["token_table"], t["chunks"], problem.slot_of_row, packed, **options)
    assert torch.equal(got, problem.embed(t, backend=backend))


def test_packed_weights_pass_gradients_to_the_chunks_only():
    problem = random_problem(3, torch.float32)
    t = leaves(problem.tensors)
    packed = rk.PackedProjection.from_weights(t["w1"], t["b1"], t["w2"], t["b2"])
    rk.project_chunks(t["chunks"], packed).sum().backward()
    assert t["chunks"].grad is not None and t["w1"].grad is None
    with pytest.raises(TypeError, match="w1: got a PackedProjection beside other weights"):
        rk.project_chunks(t["chunks"], packed, t["b1"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_accurate_far_from_zero(activation):
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.logspace(-30, -2, 200), torch.tensor([-1e4, 1e4])])[:, None]
    x = torch.cat([x, torch.zeros_like(x).expand(-1, 7)], 1).contiguous()
    w1, w2 = torch.zeros(16, 8), torch.zeros(8, 16)
    w1[0, 0] = w2[0, 0] = 1
    want = ACTIVATIONS[activation](x[:, 0].double())
    for backend in BACKENDS:
        got = rk.project_chunks(x, w1, None, w2, None, activation=activation, backend=backend)[:, 0]
        # GELU's left tail suffers cancellation in any float32 formula; below 1e-6 only the magnitude is checked.
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6 if "gelu" in activation else 1e-30)


def test_gradcheck_and_second_derivative():
    for activation in ACTIVATIONS:
        problem = random_problem(2, torch.float64)
        problem.activation = activation if activation != "relu" else "silu"  # relu is not differentiable at 0
        t = leaves(
            {"token_table": torch.randn(11, 8), "chunks": torch.randn(3, 4), "w1": torch.randn(6, 4),
             "b1": torch.randn(6), "w2": torch.randn(8, 6), "b2": torch.randn(8)}, torch.float64,
        )  # fmt: skip
        problem.token_ids, problem.slot_of_row = torch.tensor([3, 0, 0, 3]), torch.tensor([-1, 2, 2, -1]).int()

        def call(*values, problem=problem, names=tuple(t)):
            return problem.embed(dict(zip(names, values)))

        assert torch.autograd.gradcheck(call, tuple(t.values()))
    (grad,) = torch.autograd.grad((problem.embed(t) ** 2).sum(), t["w1"], create_graph=True)
    with pytest.raises(RuntimeError, match="embed_mixed_backward can't be differentiated"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    problem = random_problem(4, torch.float32)
    t = leaves(problem.tensors)
    weights = (t["w1"], t["b1"], t["w2"], t["b2"], "gelu")
    ops, options = torch.ops.refrag, {"backend": backend}
    torch.library.opcheck(ops.project_chunks.default, (t["chunks"], *weights, None), options)
    rows = (problem.token_ids, t["token_table"], t["chunks"], problem.slot_of_row)
    torch.library.opcheck(ops.embed_mixed.default, (*rows, *weights, 2.0, None), options)
    detach = lambda xs: tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in xs)  # noqa: E731
    grad = torch.randn(problem.token_ids.shape[0], t["w2"].shape[0])
    torch.library.opcheck(ops.embed_mixed_backward.default, (grad, *detach(rows), *detach(weights), 2.0), options)
    grad = torch.randn(t["chunks"].shape[0], t["w2"].shape[0])
    args = (grad, *detach((t["chunks"], *weights)))
    torch.library.opcheck(ops.project_chunks_backward.default, args, options)


@pytest.mark.compiles
def test_compiles_for_any_row_count_at_most_twice():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    problem = random_problem(4, torch.float32)
    t = leaves(problem.tensors)
    packed = rk.PackedProjection.from_weights(t["w1"], t["b1"], t["w2"], t["b2"])

    @torch.compile(fullgraph=True, backend=counter)
    def call(ids, slots, chunks, table):
        mixed = rk.embed_mixed(ids, table * 2, chunks, slots, t["w1"], t["b1"], t["w2"], t["b2"])
        return mixed + rk.embed_mixed(ids, table * 2, chunks, slots, packed)

    for rows in range(3, 23):
        ids = torch.randint(0, 11, (rows,))
        slots = torch.arange(-1, rows - 1, dtype=torch.int32)
        chunks = torch.randn(rows + 40, t["w1"].shape[1], requires_grad=True)
        out = call(ids, slots, chunks, t["token_table"])
        want = rk.embed_mixed(ids, t["token_table"] * 2, chunks, slots, t["w1"], t["b1"], t["w2"], t["b2"])
        torch.testing.assert_close(out, want * 2)
        out.sum().backward()
    assert counter.frame_count <= 2


def test_exports():
    class Layer(torch.nn.Module):
        def forward(self, ids, table, chunks, slots, packed):
            return rk.embed_mixed(ids, table, chunks, slots, packed)

    problem = random_problem(4, torch.float32)
    t = problem.tensors
    packed = rk.PackedProjection.from_weights(t["w1"], t["b1"], t["w2"], t["b2"], problem.activation)
    args = (problem.token_ids, t["token_table"], t["chunks"], problem.slot_of_row, packed)
    program = torch.export.export(Layer(), args)
    assert any(node.target == torch.ops.refrag.embed_mixed.default for node in program.graph.nodes)
    assert torch.equal(program.module()(*args), Layer()(*args))


def test_autocast():
    problem = random_problem(4, torch.float32)
    t = leaves(problem.tensors)
    packed = rk.PackedProjection.from_weights(t["w1"], t["b1"], t["w2"], t["b2"], problem.activation)
    with torch.autocast("cpu", torch.bfloat16):
        out, from_packed = problem.embed(t), rk.project_chunks(t["chunks"], packed)
    assert out.dtype == from_packed.dtype == torch.bfloat16
    narrow = {name: None if x is None else x.detach().bfloat16() for name, x in t.items()}
    assert torch.equal(out, problem.embed(narrow)) and torch.equal(from_packed, problem.project(narrow))
    out.float().sum().backward()
    assert t["w1"].grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_do_not_depend_on_the_thread_count(backend, dtype):
    problem = random_problem(10, dtype)
    problem.tensors["chunks"] = torch.randn(700, problem.tensors["w1"].shape[1]).to(dtype)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(problem.project(problem.tensors, backend=backend))
    finally:
        torch.set_num_threads(before)
    assert backend == "reference" or all(torch.equal(run, runs[0]) for run in runs)


ids, slots = torch.tensor([3, 4]), torch.tensor([-1, 0]).int()
table, chunks, w1, w2 = torch.randn(9, 16), torch.randn(2, 8), torch.randn(24, 8), torch.randn(16, 24)


def args(**changes):
    values = {"token_ids": ids, "token_table": table, "chunks": chunks, "slot_of_row": slots, "w1": w1, "b1": None}
    return {**values, "w2": w2, "b2": None, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"slot_of_row": torch.tensor([-1, 2]).int()},
            IndexError,
            r"slot_of_row: got 2 in row 1, needs -1 or .* \[0, 2\)",
        ),
        ({"slot_of_row": torch.tensor([-2, 0]).int()}, IndexError, "slot_of_row: got -2 in row 0"),
        ({"token_ids": torch.tensor([9, 0])}, IndexError, r"token_ids: got 9 in row 0, needs a token in \[0, 9\)"),
        ({"token_ids": torch.tensor([-1, 0])}, IndexError, "token_ids: got -1 in row 0"),
        ({"token_ids": ids.int()}, TypeError, "token_ids: got dtype int32, needs int64"),
        ({"slot_of_row": slots.long()}, TypeError, "slot_of_row: got dtype int64, needs int32"),
        ({"slot_of_row": slots[:1]}, ValueError, r"slot_of_row: got shape \[1\], needs \[2\]"),
        ({"token_table": table[:, :8]}, ValueError, r"token_table: got shape \[9, 8\], needs \[V, 16\]"),
        ({"token_table": table.half()}, TypeError, "token_table: got dtype float16, needs float32"),
        ({"chunks": chunks[:, :4]}, ValueError, r"chunks: got shape \[2, 4\], needs \[N, 8\]"),
        ({"chunks": chunks.bfloat16()}, TypeError, "chunks: got dtype bfloat16"),
        ({"w2": w2[:, :8]}, ValueError, r"w2: got shape \[16, 8\], needs \[d_dec, 24\]"),
        ({"b1": torch.zeros(16)}, ValueError, r"b1: got shape \[16\], needs \[24\]"),
        ({"b2": torch.zeros(16).half()}, TypeError, "b2: got dtype float16"),
        ({"w1": torch.randn(8, 24).T}, ValueError, "w1: got stride 24 in its last dimension"),
        ({"chunks": chunks.to("meta")}, ValueError, "chunks: got device meta, needs cpu"),
        ({"activation": "swish"}, ValueError, "activation: got 'swish', needs one of gelu"),
        ({"w2": None}, TypeError, "w2: got None"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(backend, changes, error, message):
    with pytest.raises(error, match=message):
        rk.embed_mixed(**args(**changes), backend=backend)
