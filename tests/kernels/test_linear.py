"""linear_rows: every backend and dtype against float64, and the op's integration with torch."""

import random

import pytest
import torch

import refrag_kernels as rk
from refrag_kernels import backends
from tests.support.accuracy import DTYPES, OUTPUT, relative_error
from tests.support.instruction_sets import LOWER, run_on

BACKENDS = backends.available("linear_rows", torch.device("cpu"))


def problem(seed, dtype):
    """Return x, weight, and bias or None: views into larger tensors with NaN outside the view."""
    rng = random.Random(seed)
    count, width = rng.choice([1, 1, 2, 3, 4, 5, 9]), rng.choice([1, 7, 16, 31, 33, 64, 100, 576])
    outputs = rng.choice([1, 3, 15, 16, 17, 100, 333])
    generator = torch.Generator().manual_seed(seed)

    def within(*shape):
        tensor = torch.full([size + 3 for size in shape], torch.nan, dtype=dtype)
        view = tensor[tuple(slice(1, 1 + size) for size in shape)]
        view.copy_(torch.randn(*shape, generator=generator))
        return view

    return within(count, width), within(outputs, width), within(outputs) if seed % 2 else None


def wide(*tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


def check_all():
    """Compare many problems with float64; also called for each instruction set."""
    for dtype in DTYPES:
        for seed in range(60):
            x, weight, bias = problem(seed, dtype)
            want = torch.nn.functional.linear(*wide(x, weight, bias))
            torch.utils.deterministic.fill_uninitialized_memory = True
            for backend in BACKENDS:
                got = rk.linear_rows(x, weight, bias, backend=backend)
                assert got.dtype == dtype and relative_error(got, want) <= OUTPUT[dtype], f"seed {seed}, {backend}"


def test_against_float64():
    assert "cpu" in BACKENDS
    check_all()


@pytest.mark.parametrize("isa", LOWER)
def test_against_float64_on_every_instruction_set(isa):
    run_on(isa, __name__, "check_all")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_neither_threads_nor_the_other_rows(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(6, 576).to(dtype), torch.randn(1000, 576).to(dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(rk.linear_rows(x, weight))
            results.append(torch.cat([rk.linear_rows(row[None], weight) for row in x]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_float64(backend):
    empty = torch.randn(0, 5), torch.randn(3, 5), torch.randn(3)
    assert rk.linear_rows(*empty, backend=backend).shape == (0, 3)
    assert rk.linear_rows(torch.randn(2, 5), torch.randn(0, 5), backend=backend).shape == (2, 0)
    nothing = rk.linear_rows(torch.randn(2, 0), torch.randn(3, 0), torch.arange(3.0), backend=backend)
    assert torch.equal(nothing, torch.arange(3.0).expand(2, 3))
    x, weight = torch.randn(2, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(rk.linear_rows(x, weight), x @ weight.T)


@pytest.mark.compiles
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend):
    x, weight, bias = torch.randn(2, 8), torch.randn(5, 8), torch.randn(5)
    torch.library.opcheck(torch.ops.refrag.linear_rows.default, (x, weight, bias), {"backend": backend})
    call = torch.compile(lambda x: rk.linear_rows(x, weight, bias, backend=backend) * 2, fullgraph=True,
                         backend="aot_eager")  # fmt: skip
    torch.testing.assert_close(call(x), 2 * torch.nn.functional.linear(x, weight, bias))


def test_autocast_and_no_gradient():
    x, weight = torch.randn(2, 8), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert rk.linear_rows(x, weight).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="linear_rows can't be differentiated"):
        rk.linear_rows(x.requires_grad_(), weight).sum().backward()


good = torch.randn(2, 4), torch.randn(3, 4), torch.randn(3)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({0: torch.randn(2, 5)}, ValueError, r"x: got shape \[2, 5\], needs \[N, 4\]"),
        ({0: torch.randn(4)}, ValueError, r"x: got shape \[4\], needs \[N, 4\]"),
        ({0: torch.randn(2, 4).half()}, TypeError, "x: got dtype float16, needs float32"),
        ({1: torch.randn(3)}, ValueError, r"weight: got shape \[3\], needs \[d_out, d_in\]"),
        ({1: torch.ones(3, 4).int()}, TypeError, "weight: got dtype int32"),
        ({1: torch.randn(4, 3).T}, ValueError, "weight: got stride 3 in its last dimension"),
        ({2: torch.randn(4)}, ValueError, r"bias: got shape \[4\], needs \[3\]"),
        ({2: torch.randn(6)[::2]}, ValueError, "bias: got stride 2"),
        ({2: torch.randn(3).double()}, TypeError, "bias: got dtype float64"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(backend, changed, error, message):
    with pytest.raises(error, match=message):
        rk.linear_rows(*(changed.get(index, tensor) for index, tensor in enumerate(good)), backend=backend)
