"""pool_chunks, project_chunks and embed_mixed with Triton's kernels in the interpreter, against float64."""

import pytest
import torch

import refrag_kernels as rk
from tests.kernels import test_pooling, test_projection
from tests.support.accuracy import DTYPES, OUTPUT, relative_error
from tests.triton.modes import ALL

SEEDS = range(18) if ALL else (2, 4, 9)


@pytest.mark.parametrize("seed", range(12) if ALL else (2,))
@pytest.mark.parametrize("mode", test_pooling.MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooling_against_float64(dtype, mode, seed):
    test_pooling.test_against_float64("triton", dtype, mode, seed)


def test_offsets_that_leave_the_rows_make_zeros():
    hidden = torch.randn(4, 8)
    for mode in test_pooling.MODES:
        offsets = torch.tensor([0, 2, 9, 4], dtype=torch.int32)
        out = torch.ops.refrag.pool_chunks(hidden, offsets, mode, backend="triton")
        assert out[0].any() and not out[1:].any()


@pytest.mark.parametrize("call", ["embed", "project"])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projection_against_float64(dtype, seed, call):
    if dtype != torch.float32 and not ALL and seed != 4:
        return
    test_projection.test_against_float64("triton", dtype, seed, call)


@pytest.mark.parametrize("activation", test_projection.ACTIVATIONS)
def test_activations(activation):
    x = torch.linspace(-6, 6, 64).reshape(8, 8)
    eye = torch.eye(8)
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    got = rk.project_chunks(leaf, eye, None, eye, None, activation=activation, backend="triton")
    want = test_projection.ACTIVATIONS[activation](wide)
    assert relative_error(got.detach(), want.detach()) <= OUTPUT[torch.float32]
    (grad,) = torch.autograd.grad(got.sum(), leaf)
    (expected,) = torch.autograd.grad(want.sum(), wide)
    assert relative_error(grad, expected) <= 8e-6


@pytest.mark.parametrize("rows", (16, 40, 300))
def test_every_tile_of_the_table(rows):
    """Each row bucket of configs.linear, with sizes that no tile divides."""
    a, w1, w2 = torch.randn(rows, 72), torch.randn(40, 72), torch.randn(136, 40)
    got = rk.project_chunks(a, w1, None, w2, None, activation="none", backend="triton")
    assert relative_error(got, a.double() @ w1.double().T @ w2.double().T) <= OUTPUT[torch.float32]


def test_bad_indices_make_rows_of_zeros():
    table, chunks, weight = torch.randn(5, 8), torch.randn(2, 8), torch.eye(8)
    ids, slots = torch.tensor([5, -1, 3, 0]), torch.tensor([-1, -1, 2, 1], dtype=torch.int32)
    args = (ids, table, chunks, slots, weight, None, weight, None, "none", 1.0, None)
    out = torch.ops.refrag.embed_mixed(*args, backend="triton")
    assert not out[:3].any() and torch.allclose(out[3], chunks[1])


def test_opcheck():
    test_pooling.test_opcheck("triton", "mean")
    test_projection.test_opcheck("triton")
