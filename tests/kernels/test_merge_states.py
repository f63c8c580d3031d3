"""merge_states: values and gradients against float64, empty states, compile."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

import refrag_kernels as rk
from tests.support.accuracy import GRADIENT, LSE, OUTPUT, relative_error
from tests.support.paged_problems import BACKENDS, COMBINATIONS, name_of


def make_states(seed, rows, heads, dim, dtype, *, spread=3.0, strided=False):
    """Return two states with rows that are empty in the first, the second, or both (with NaN outputs)."""
    generator = torch.Generator().manual_seed(seed)
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    states = []
    for empty in ((1, 3), (2, 3)):
        out = torch.randn(rows, heads, dim, generator=generator, dtype=torch.float64).to(dtype)
        lse = (spread * torch.randn(rows, heads, generator=generator, dtype=torch.float64)).to(lse_dtype)
        for row in empty:
            out[row::5, 0] = torch.nan
            lse[row::5, 0] = -torch.inf
        if strided:
            out = torch.cat([out, out], 2).transpose(0, 1).contiguous().transpose(0, 1)[..., dim:]
            lse = lse.t().contiguous().t()
        states += [out, lse]
    return states


def merge_by_hand(out_a, lse_a, out_b, lse_b):
    """Merge in float64 from the denominators, differentiably."""
    share_a, share_b = lse_a.double().exp(), lse_b.double().exp()
    total = share_a + share_b
    sums = sum(
        torch.where(share > 0, share, 0.0)[..., None] * torch.where((share > 0)[..., None], out.double(), 0.0)
        for share, out in ((share_a, out_a), (share_b, out_b))
    )
    return sums / total.clamp_min(torch.finfo(torch.float64).tiny)[..., None], total.log()


SHAPES = [(23, 4, 16), (7, 3, 40), (600, 9, 64), (1, 1, 1), (5, 2, 5), (0, 4, 16)]


@pytest.mark.parametrize(("backend", "dtype"), COMBINATIONS, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_equals_float64(shape, backend, dtype, strided):
    states = make_states(sum(shape), *shape, dtype, strided=strided)
    out, lse = rk.merge_states(*states, backend=backend)
    expected = merge_by_hand(*states)
    assert out.dtype == dtype and lse.dtype == states[1].dtype
    assert relative_error(out, expected[0]) <= OUTPUT[dtype]
    assert relative_error(lse, expected[1]) <= LSE[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_states(backend):
    """Merging two empty states gives an empty one; with one empty, the result is bitwise equal to the other."""
    out_a, lse_a, out_b, lse_b = make_states(0, 20, 2, 8, torch.float32)
    out, lse = rk.merge_states(out_a, lse_a, out_b, lse_b, backend=backend)
    assert torch.equal(out[3::5, 0], torch.zeros(4, 8)) and torch.equal(lse[3::5, 0], torch.full((4,), -torch.inf))
    assert torch.equal(out[1::5, 0], out_b[1::5, 0]) and torch.equal(lse[1::5, 0], lse_b[1::5, 0])
    assert torch.equal(out[2::5, 0], out_a[2::5, 0]) and torch.equal(lse[2::5, 0], lse_a[2::5, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_log_sums_do_not_overflow(backend):
    out_a, out_b = torch.ones(1, 1, 8), torch.full((1, 1, 8), 3.0)
    for shift in (-1e4, 1e4):
        out, lse = rk.merge_states(out_a, torch.full((1, 1), shift), out_b, torch.full((1, 1), shift), backend=backend)
        assert torch.equal(out, torch.full((1, 1, 8), 2.0))
        assert lse.item() == pytest.approx(shift + 0.6931472)


@pytest.mark.parametrize("nan", [0, 1, 2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_comes_through(nan, backend):
    states = [torch.ones(1, 1, 8), torch.zeros(1, 1), torch.ones(1, 1, 8), torch.zeros(1, 1)]
    states[nan] = torch.full_like(states[nan], torch.nan)
    out, lse = rk.merge_states(*states, backend=backend)
    assert out.isnan().all() and lse.isnan().all() == (nan % 2 == 1)


@pytest.mark.parametrize(("backend", "dtype"), COMBINATIONS, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_gradients_equal_float64(shape, backend, dtype):
    states = make_states(sum(shape), *shape, dtype)
    generator = torch.Generator().manual_seed(1)
    inputs = [x.clone().requires_grad_() for x in states]
    out, lse = rk.merge_states(*inputs, backend=backend)
    grads = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (out, lse)]
    grads[1][lse == -torch.inf] = 0
    torch.autograd.backward((out, lse), grads)
    exact = [x.detach().double().requires_grad_() for x in states]
    # In empty states d log(0) is NaN; the gradients there are 0, the limit of the formula.
    finite = [x.detach().nan_to_num(neginf=-700.0).double().requires_grad_() for x in exact]
    torch.autograd.backward(merge_by_hand(*finite), [g.double() for g in grads])
    both = (states[1] == -torch.inf) & (states[3] == -torch.inf)
    for x, y, upstream in zip(inputs, finite, (grads[0], grads[1]) * 2, strict=True):
        expected = y.grad.masked_fill(both if y.dim() == 2 else both[..., None], 0.0)
        assert relative_error(x.grad, expected, upstream) <= GRADIENT[dtype]


def test_gradcheck():
    states = [x.nan_to_num(nan=0.5, neginf=-2.0).requires_grad_() for x in make_states(2, 3, 2, 8, torch.float64)]
    torch.autograd.gradcheck(rk.merge_states, states)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_raises(backend):
    states = [x.nan_to_num(neginf=-2.0).requires_grad_() for x in make_states(2, 3, 2, 8, torch.float32)]
    out, _ = rk.merge_states(*states, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), states[0], create_graph=True)
    with pytest.raises(RuntimeError, match="merge_states_backward can't be differentiated"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_gradients(backend):
    """The gradient of sum() has strides of 0."""
    states = [x.nan_to_num(neginf=-2.0).requires_grad_() for x in make_states(2, 3, 2, 8, torch.float32)]
    out, lse = rk.merge_states(*states, backend=backend)
    (out.sum() + lse.sum()).backward()
    torch.testing.assert_close(states[0].grad + states[2].grad, torch.ones(3, 2, 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    states = [x.nan_to_num(neginf=-2.0).requires_grad_() for x in make_states(2, 6, 2, 8, torch.float32)]
    torch.library.opcheck(torch.ops.refrag.merge_states.default, states, {"backend": backend})
    plain = [x.detach() for x in states]
    torch.library.opcheck(
        torch.ops.refrag.merge_states_backward.default, (plain[0], plain[1], *plain), {"backend": backend}
    )


@pytest.mark.compiles
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_with_dynamic_shapes(backend):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def merge(out_a, lse_a, out_b, lse_b):
        out, lse = rk.merge_states(out_a * 1.0, lse_a, out_b, lse_b, backend=backend)
        return out * 2.0, lse

    for rows in (7, 31, 12):
        states = [x.nan_to_num(neginf=-2.0).requires_grad_() for x in make_states(rows, rows, 3, 16, torch.float32)]
        out, lse = merge(*states)
        (out.sum() + lse.sum()).backward()
        assert relative_error(out.detach() / 2, merge_by_hand(*states)[0].detach()) <= OUTPUT[torch.float32]
        torch.testing.assert_close(states[0].grad + states[2].grad, torch.full((rows, 3, 16), 2.0))
    assert counter.frame_count == 1


BAD = [
    ({"out_a": torch.zeros(3, 2, 8).int()}, TypeError, "out_a: got dtype int32, needs float32 or"),
    ({"out_a": torch.zeros(6, 8)}, ValueError, r"out_a: got shape \[6, 8\], needs \[T, H, D\]"),
    ({"out_b": torch.zeros(3, 2, 8).half()}, TypeError, "out_b: got dtype float16, needs float32"),
    ({"out_b": torch.zeros(3, 1, 8)}, ValueError, r"out_b: got shape \[3, 1, 8\], needs \[3, 2, 8\]"),
    ({"out_b": torch.zeros(3, 2, 16)[..., ::2]}, ValueError, "out_b: got stride 2 in its last dimension"),
    ({"lse_a": torch.zeros(3, 2).double()}, TypeError, "lse_a: got dtype float64, needs float32"),
    ({"lse_b": torch.zeros(3)}, ValueError, r"lse_b: got shape \[3\], needs \[3, 2\]"),
    ({"lse_b": torch.zeros(3, 2, device="meta")}, ValueError, "lse_b: got device meta, needs cpu"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_bad_input(change, error, message):
    call = {
        "out_a": torch.zeros(3, 2, 8), "lse_a": torch.zeros(3, 2), "out_b": torch.zeros(3, 2, 8),
        "lse_b": torch.zeros(3, 2),
    }  # fmt: skip
    rk.merge_states(**call)
    with pytest.raises(error, match=message):
        rk.merge_states(**{**call, **change})
