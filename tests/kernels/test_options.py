"""scale, softcap and window: non-numbers raise an error that names the option, and NumPy numbers are accepted."""

import numpy
import pytest
import torch

import refrag_kernels as rk
from tests.support.accuracy import relative_error

layout = rk.ChunkLayout.from_lengths([[12]])
plan = rk.plan_attention(layout)
q = torch.randn(12, 2, 8)
pages, table = torch.randn(3, 4, 2, 8), torch.tensor([[0, 1, 2]], dtype=torch.int32)
lengths = torch.tensor([12], dtype=torch.int32)


def mixed(**options):
    return rk.mixed_attention(q, q, q, plan, **options)


def paged(**options):
    return rk.paged_attention(q[:1], pages, pages, table, lengths, **options)


@pytest.mark.parametrize("call", [mixed, paged])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"softcap": float("inf")}, ValueError, "softcap: got inf, needs a finite number"),
        ({"softcap": float("nan")}, ValueError, "softcap: got nan, needs a finite number"),
        ({"softcap": 0.0}, ValueError, "softcap: got 0.0, needs a positive number or None"),
        ({"softcap": "a"}, TypeError, "softcap: got str, needs a number"),
        ({"scale": "a"}, TypeError, "scale: got str, needs a number"),
        ({"scale": (1.0,)}, TypeError, "scale: got tuple, needs a number"),
        ({"scale": float("inf")}, ValueError, "scale: got inf, needs a finite number"),
        ({"scale": 1e39}, ValueError, r"scale: got 1e\+39, needs a number from -2\^126 to 2\^126"),
        ({"scale": -(10**39)}, ValueError, "scale: got -10+, needs a number from"),
        ({"softcap": 1e300}, ValueError, r"softcap: got 1e\+300, needs a number from"),
        ({"softcap": 1e-46}, ValueError, r"softcap: got 1e-46, needs at least 2\^-126"),
    ],
    ids=str,
)
def test_bad_numbers(call, options, error, message):
    with pytest.raises(error, match=message):
        call(**options)


@pytest.mark.parametrize("call", [mixed, paged])
def test_numbers_of_other_types(call):
    for number in (numpy.float32(0.25), numpy.float64(0.25), numpy.int64(2), 2):
        assert torch.equal(call(scale=number), call(scale=float(number)))
        assert torch.equal(call(softcap=number), call(softcap=float(number)))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("softcap", [2.0**-126, 1e-20, 1e6, 1e20, 2.0**126])
def test_extreme_softcaps(backend, softcap):
    for call, leaf in ((mixed, q), (paged, q[:1])):
        got = call(softcap=softcap, backend=backend)
        wide = [tensor.double() for tensor in (q, pages)]
        want = (
            rk.mixed_attention(wide[0], wide[0], wide[0], plan, softcap=softcap, backend="reference")
            if call is mixed
            else rk.paged_attention(wide[0][:1], wide[1], wide[1], table, lengths, softcap=softcap, backend="reference")
        )
        assert got.shape == leaf.shape and relative_error(got, want) < 1e-6


def test_a_scale_of_the_token_table():
    w1, w2, ids = torch.randn(16, 8), torch.randn(8, 16), torch.zeros(2, dtype=torch.int64)
    slots = torch.tensor([-1, 0], dtype=torch.int32)
    with pytest.raises(TypeError, match="token_scale: got str, needs a number"):
        rk.embed_mixed(ids, torch.randn(5, 8), torch.randn(1, 8), slots, w1, None, w2, token_scale="a")
    with pytest.raises(ValueError, match=r"token_scale: got 1e\+39, needs a number from"):
        rk.embed_mixed(ids, torch.randn(5, 8), torch.randn(1, 8), slots, w1, None, w2, token_scale=1e39)


def planned(window):
    return rk.plan_attention(layout, window=window)


def decoded(window):
    return paged(window=window)


@pytest.mark.parametrize("call", [planned, decoded])
@pytest.mark.parametrize("window", [(3,), (1, 2, 3), 2.5, "a", (1.5, 2), ("a", "b"), True], ids=str)
def test_bad_windows(call, window):
    with pytest.raises(TypeError, match="window: got .*, needs an int, a pair of ints"):
        call(window)


@pytest.mark.parametrize(("window", "same"), [(numpy.int64(3), 3), ([3, -1], (3, -1)), (numpy.array([3, 2]), (3, 2))])
def test_windows_of_other_types(window, same):
    assert torch.equal(decoded(window), decoded(same))
    for got, want in zip(planned(window).tensors(), planned(same).tensors()):
        assert torch.equal(got, want)


def test_more_rows_than_positions_count():
    """Positions are int32 on every device; the product of pages and rows per page must not overflow."""
    page = torch.empty(1, 1 << 15, 1, 8, device="meta")
    tables = torch.empty(1, 1 << 16, dtype=torch.int32, device="meta"), torch.empty(1, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match="page_table: got 65536 pages of 32768 rows per sequence, needs at most"):
        rk.paged_attention(torch.empty(1, 1, 8, device="meta"), page, page, *tables)
    with pytest.raises(ValueError, match="page_table: got 65536 pages of 32768 rows per sequence, needs at most"):
        rk.append_kv(*[torch.empty(1, 1, 8, device="meta")] * 2, page, page, *tables, tables[0][0, :2])
