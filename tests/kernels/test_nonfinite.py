"""A NaN or inf in queries, keys or values reaches only the rows that attend to it, in every backend."""

import pytest
import torch

import refrag_kernels as rk
from refrag_kernels import backends
from tests.support.accuracy import DTYPES
from tests.support.nonfinite import spoilt_paged, spoilt_problem

BACKENDS = backends.available("mixed_attention", torch.device("cpu"))


@pytest.mark.parametrize("first_seed", range(0, 40, 10))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_attention(backend, dtype, first_seed):
    for seed in range(first_seed, first_seed + 10):
        problem = spoilt_problem(seed, dtype)
        try:
            problem.check(problem.spoilt.run(backend))
        except AssertionError as error:
            raise AssertionError(f"spoilt_problem({seed}, {dtype}): {error}") from error


@pytest.mark.parametrize("first_seed", range(0, 60, 20))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_paged_attention(backend, dtype, first_seed):
    for seed in range(first_seed, first_seed + 20):
        spoilt = spoilt_paged(seed, dtype)
        out, lse = rk.paged_attention(*spoilt.problem.args, **spoilt.problem.options, return_lse=True, backend=backend)
        try:
            spoilt.check(out, lse)
        except AssertionError as error:
            raise AssertionError(f"spoilt_paged({seed}, {dtype}): {error}") from error


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_key_of_nan_is_not_a_key_that_is_not_seen(backend):
    """A row whose only key is NaN attends to it: out and lse differ from those of a fully masked row."""
    q, page = torch.ones(1, 1, 8), torch.full((1, 16, 1, 8), torch.nan)
    table, length = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[1]]))
    for sinks in (None, torch.zeros(1)):
        for out, lse in (
            rk.paged_attention(
                q, page, torch.zeros_like(page), table, length, sinks=sinks, return_lse=True, backend=backend
            ),
            rk.mixed_attention(q, page[0, :1], q, plan, sinks=sinks, return_lse=True, backend=backend),
        ):
            assert out.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_merge_states(backend):
    """Rows are independent, and a non-finite state is not treated as empty."""
    inf, nan = float("inf"), float("nan")
    out_a, out_b = torch.ones(4, 2, 8), torch.full((4, 2, 8), 3.0)
    lse_a, lse_b = torch.zeros(4, 2), torch.tensor([[0.0, nan], [-inf, -inf], [0.0, -200.0], [0.0, 0.0]])
    lse_a[1, 0], out_b[1, 1], out_b[2, 1, 3], out_a[3, 0, 5] = nan, nan, nan, inf
    out, lse = rk.merge_states(out_a, lse_a, out_b, lse_b, backend=backend)
    bad = torch.zeros(4, 2, 8, dtype=torch.bool)
    bad[0, 1], bad[1, 0], bad[2, 1, 3], bad[3, 0, 5] = True, True, True, True
    assert torch.equal(~out.isfinite(), bad) and torch.equal(lse.isnan(), bad.all(-1))
    assert torch.equal(out[0, 0], torch.full((8,), 2.0)) and torch.equal(out[1, 1], torch.ones(8))


@pytest.mark.parametrize("bits", (0x7FC00001, 0x7FC001FF, 0x7F800001, -1))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_may_have_any_bits(backend, bits):
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[40]]))
    q, k = torch.randn(40, 1, 16), torch.randn(40, 1, 16)
    q[30, 0, 5] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)[0]
    out, lse = rk.mixed_attention(q, k, k, plan, return_lse=True, backend=backend)
    assert out[30].isnan().all() and lse[30].isnan().all() and lse[29].isfinite().all()
    lse[30] = 0.0
    received = rk.attention_received(q, k, lse, plan, backend=backend)
    assert received[:31].isnan().all() and received[31:].isfinite().all()
    tables = torch.arange(3, dtype=torch.int32)[None], torch.tensor([40], dtype=torch.int32)
    pages = torch.cat([k, k[:8]]).view(3, 16, 1, 16)
    out, lse = rk.paged_attention(q[30:31], pages, pages, *tables, return_lse=True, backend=backend)
    assert out.isnan().all() and lse.isnan().all()
