"""pool_chunks: every backend and dtype against float64, and the op's integration with torch."""

import random

import pytest
import torch

import refrag_kernels as rk
from refrag_kernels import backends
from tests.support.accuracy import DTYPES, OUTPUT, relative_error
from tests.support.factory import random_lengths

BACKENDS = backends.available("pool_chunks", torch.device("cpu"))
MODES = ("mean", "first", "last")


def problem(seed, dtype):
    """Return hidden states (a strided view, with rows beyond the last chunk) and chunk offsets."""
    rng = random.Random(seed)
    layout = rk.ChunkLayout.from_lengths(random_lengths(rng))
    width = rng.choice([1, 7, 16, 33, 384])
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(layout.total_rows + rng.choice([0, 3]), width + rng.choice([0, 5]), generator=generator)
    return hidden.to(dtype)[:, :width], layout.chunk_offsets


def pooled(hidden, offsets, mode):
    """Compute the specification literally."""
    chunks = [hidden[a:b] for a, b in zip(offsets.tolist(), offsets.tolist()[1:])]
    pick = {"mean": lambda c: c.mean(0), "first": lambda c: c[0], "last": lambda c: c[-1]}[mode]
    return torch.stack([pick(chunk) for chunk in chunks]) if chunks else hidden[:0]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend, dtype, mode, seed):
    hidden, offsets = problem(seed, dtype)
    wide = hidden.double().requires_grad_()
    want = pooled(wide, offsets, mode)
    leaf = hidden.detach().requires_grad_()
    got = rk.pool_chunks(leaf, offsets, mode, backend=backend)
    assert relative_error(got.detach(), want.detach()) <= OUTPUT[dtype], f"seed {seed}"
    upstream = torch.randn(got.shape).to(dtype)
    (grad,) = torch.autograd.grad(got, leaf, upstream)
    (want_grad,) = torch.autograd.grad(want, wide, upstream.double(), allow_unused=True)
    want_grad = torch.zeros_like(wide) if want_grad is None else want_grad
    assert relative_error(grad, want_grad) <= OUTPUT[dtype], f"seed {seed}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_offsets(backend, mode):
    hidden, offsets = torch.randn(9, 3), torch.tensor([0, 7, 2, 7, 9, 7], dtype=torch.int32)[::2]
    torch.testing.assert_close(rk.pool_chunks(hidden, offsets, mode, backend=backend), pooled(hidden, offsets, mode))


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_and_second_derivative(mode):
    hidden, offsets = torch.randn(9, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 2, 3, 9]).int()
    assert torch.autograd.gradcheck(lambda h: rk.pool_chunks(h, offsets, mode), hidden)
    (grad,) = torch.autograd.grad((rk.pool_chunks(hidden, offsets, mode) ** 2).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="pool_chunks_backward can't be differentiated"):
        grad.sum().backward()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, mode):
    hidden, offsets = problem(3, torch.float32)
    leaf = hidden.detach().clone().requires_grad_()
    torch.library.opcheck(torch.ops.refrag.pool_chunks.default, (leaf, offsets, mode), {"backend": backend})
    grad = torch.randn(offsets.shape[0] - 1, hidden.shape[1])
    args = (grad, offsets, mode, hidden.shape[0])
    torch.library.opcheck(torch.ops.refrag.pool_chunks_backward.default, args, {"backend": backend})


@pytest.mark.compiles
def test_compiles_for_any_layout_at_most_twice():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = torch.compile(lambda h, o: rk.pool_chunks(h * 2, o, "mean"), fullgraph=True, backend=counter)
    for rows in range(4, 24):
        hidden, offsets = torch.randn(rows, 8, requires_grad=True), torch.tensor([0, *range(2, rows, 2), rows]).int()
        torch.testing.assert_close(call(hidden, offsets), rk.pool_chunks(hidden * 2, offsets, "mean"))
    assert counter.frame_count <= 2


hidden = torch.randn(6, 4)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((hidden, torch.tensor([0, 6]), "mean"), TypeError, "chunk_offsets: got dtype int64, needs int32"),
        (
            (hidden, torch.tensor([0, 7]).int(), "mean"),
            ValueError,
            "chunk_offsets: got first 0 and last 7, needs 0 and",
        ),
        ((hidden, torch.tensor([1, 6]).int(), "mean"), ValueError, "chunk_offsets: got first 1"),
        ((hidden, torch.tensor([0, 4, 4]).int(), "last"), ValueError, "got a length of 0 for chunk 1"),
        ((hidden, torch.tensor([0, 4, 2, 6]).int(), "last"), ValueError, "got a length of -2 for chunk 1"),
        ((hidden, torch.zeros(0).int(), "mean"), ValueError, r"chunk_offsets: got shape \[0\], needs \[C \+ 1\]"),
        ((hidden, torch.tensor([0, 6]).int(), "max"), ValueError, "mode: got 'max', needs one of mean, first, last"),
        ((hidden[0], torch.tensor([0, 6]).int(), "mean"), ValueError, r"hidden: got shape \[4\], needs \[T, d\]"),
        ((hidden.int(), torch.tensor([0, 6]).int(), "mean"), TypeError, "hidden: got dtype int32"),
        ((hidden.T, torch.tensor([0, 4]).int(), "mean"), ValueError, "hidden: got stride 4 in its last dimension"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(backend, args, error, message):
    with pytest.raises(error, match=message):
        rk.pool_chunks(*args, backend=backend)
