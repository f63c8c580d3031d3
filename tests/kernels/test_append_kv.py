"""append_kv writes every row to its place and changes nothing else."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

import refrag_kernels as rk
from tests.support.paged_problems import BACKENDS, COMBINATIONS, name_of, random_cache


def int32(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_append(seed, lengths, rows, *, kv_heads=2, dim=16, page=4, dtype=torch.float32, wide=False):
    """Return the arguments of a call that appends the last ``rows`` of each sequence, and the pages afterwards."""
    generator = torch.Generator().manual_seed(seed)
    keys, values, k_after, v_after, table = random_cache(
        generator, lengths, kv_heads=kv_heads, dim=dim, page=page, dtype=dtype, wide=wide
    )
    # With ``wide``, the whole buffer is compared, so that a stray write between the pages is detected.
    before = [torch.empty_like(pages._base if wide else pages).copy_(pages._base if wide else pages)
              for pages in (k_after, v_after)]  # fmt: skip
    if wide:
        before = [buffer.as_strided(pages.shape, pages.stride(), pages.storage_offset())
                  for buffer, pages in zip(before, (k_after, v_after), strict=True)]  # fmt: skip
    for b, (length, count) in enumerate(zip(lengths, rows, strict=True)):
        for j in range(length - count, length):
            for pages in before:
                pages[table[b, j // page], j % page] = torch.nan
        # Pages of old rows may have been freed.
        table[b, : (length - count) // page] = -5
    k, v = (
        torch.cat(
            [x[len(x) - count :] for x, count in zip(tensors, rows, strict=True)] or [torch.empty(0, kv_heads, dim)]
        )
        for tensors in (keys, values)
    )
    if wide:
        k, v = (torch.cat([x, x], 2).transpose(0, 1).contiguous().transpose(0, 1)[..., :dim] for x in (k, v))
    offsets = int32(*[sum(rows[:b]) for b in range(len(rows) + 1)])
    return (k.to(dtype), v.to(dtype), *before, table, int32(*lengths), offsets), (k_after, v_after)


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare the whole storage of a view, with NaN equal to itself."""
    got, expected = (x if x._base is None else x._base for x in (got, expected))
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


CASES = {
    "one row each": {"lengths": [1, 4, 5, 30], "rows": [1, 1, 1, 1]},
    "many": {"lengths": [200, 3, 0, 17, 90], "rows": [150, 0, 0, 17, 65]},
    "none": {"lengths": [5, 6], "rows": [0, 0]},
    "no sequence": {"lengths": [], "rows": []},
    "page of 1": {"lengths": [9, 2], "rows": [4, 2], "page": 1},
    "one head": {"lengths": [9, 20], "rows": [4, 3], "kv_heads": 1, "dim": 8},
    "strided": {"lengths": [9, 20], "rows": [4, 20], "wide": True},
}


@pytest.mark.parametrize(("backend", "dtype"), COMBINATIONS, ids=name_of)
@pytest.mark.parametrize("case", CASES)
def test_rows_land_in_their_places(case, backend, dtype):
    call, after = make_append(len(case), dtype=dtype, **CASES[case])
    assert rk.append_kv(*call, backend=backend) is None
    for got, expected in zip(call[2:4], after, strict=True):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_append_then_attend(backend):
    """Appending a chunk to the cache and attending equals plain attention over all rows."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 11, 2, 16).unbind()
    k_pages, v_pages = torch.full((2, 6, 4, 2, 16), torch.nan).unbind()
    table = int32([4, 1, 0])
    outs = []
    for start, end in ((0, 6), (6, 7), (7, 11)):
        lengths, offsets = int32(end), int32(0, end - start)
        rk.append_kv(k[start:end], v[start:end], k_pages, v_pages, table, lengths, offsets, backend=backend)
        outs.append(
            rk.paged_attention(q[start:end], k_pages, v_pages, table, lengths, q_offsets=offsets, backend=backend)
        )
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(0, 1) for x in (q, k, v)), is_causal=True
    )
    torch.testing.assert_close(torch.cat(outs).double(), expected.transpose(0, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    call, _ = make_append(1, [9, 20], [4, 3])
    call = tuple(x.nan_to_num() if x.is_floating_point() else x for x in call)
    torch.library.opcheck(torch.ops.refrag.append_kv.default, call, {"backend": backend})


@pytest.mark.compiles
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_with_dynamic_shapes(backend):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def append(k, v, *cache):
        rk.append_kv(k * 1.0, v, *cache, backend=backend)
        return cache[0].sum()

    # All sizes of the first call differ: dynamo would treat equal sizes as one symbol.
    for seed, (lengths, rows) in enumerate(
        [([33, 9, 7], [3, 4, 2]), ([50, 31], [1, 6]), ([80, 3, 3, 3], [5, 1, 0, 3])]
    ):
        call, after = make_append(seed, lengths, rows, page=5)
        append(*call)
        for got, expected in zip(call[2:4], after, strict=True):
            assert_same_bits(got, expected)
    assert counter.frame_count == 1


def test_autocast_casts_the_rows_to_the_cache():
    call, after = make_append(1, [9, 20], [4, 3], dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rk.append_kv(call[0].float(), call[1].float(), *call[2:])
    for got, expected in zip(call[2:4], after, strict=True):
        assert_same_bits(got, expected)


BAD = [
    ({"page_table": int32([0, 1, 9], [2, 3, 0])}, ValueError, r"page_table: got page 9 at \[0, 2\], needs 0 to 4"),
    ({"kv_lengths": int32(13, 5)}, ValueError, "kv_lengths: got 13 for sequence 0, needs 0 to 12"),
    ({"kv_lengths": int32(9, 0)}, ValueError, "kv_lengths: got 0 for sequence 1, needs at least 1"),
    ({"q_offsets": int32(0, 4, 3)}, ValueError, "q_offsets: got 4 before 3 at sequence 1, needs ascending"),
    ({"q_offsets": int32(0, 2, 2)}, ValueError, "q_offsets: got 2 at its end, needs 3"),
    ({"q_offsets": int32(0, 3)}, ValueError, r"q_offsets: got shape \[2\], needs \[3\]"),
    ({"k": torch.zeros(3, 4, 16)}, ValueError, r"k: got shape \[3, 4, 16\], needs \[T, 2, 16\]"),
    ({"v": torch.zeros(2, 2, 16)}, ValueError, r"v: got shape \[2, 2, 16\], needs \[3, 2, 16\]"),
    ({"v": torch.zeros(3, 2, 16).half()}, TypeError, "v: got dtype float16, needs float32"),
    ({"k_pages": torch.zeros(5, 4, 2, 16).half()}, TypeError, "k_pages: got dtype float16, needs float32"),
    ({"v": torch.zeros(3, 2, 32)[..., ::2]}, ValueError, "v: got stride 2 in its last dimension"),
    ({"v": torch.zeros(3, 2, 16, device="meta")}, ValueError, "v: got device meta, needs cpu"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_bad_input(change, error, message, backend):
    pages = torch.zeros(5, 4, 2, 16)
    call = {
        "k": torch.ones(3, 2, 16), "v": torch.ones(3, 2, 16), "k_pages": pages, "v_pages": torch.zeros(5, 4, 2, 16),
        "page_table": int32([0, 1, 2], [3, 4, -7]), "kv_lengths": int32(9, 5), "q_offsets": int32(0, 2, 3),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        rk.append_kv(**{**call, **change}, backend=backend)
    assert not pages.any()
    rk.append_kv(**call, backend=backend)


def pages_and_tables():
    pages = torch.zeros(1, 4, 1, 8)
    return pages, (int32(0)[None], int32(1), int32(0, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_pass_that_needs_the_old_pages_says_so(backend):
    """As after any in-place change: a gradient computed from the new values would be silently wrong."""
    pages, tables = pages_and_tables()
    weight = torch.ones(1, requires_grad=True)
    loss = (weight * pages).sum()
    rk.append_kv(torch.ones(1, 1, 8), torch.ones(1, 1, 8), pages, pages.clone(), *tables, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_versions_of_both_pages_count(backend):
    pages, tables = pages_and_tables()
    k_pages, v_pages, row = pages.clone(), pages.clone(), torch.ones(1, 1, 8)
    before = k_pages._version, v_pages._version, row._version
    rk.append_kv(row, row, k_pages, v_pages, *tables, backend=backend)
    assert k_pages._version > before[0] and v_pages._version > before[1] and row._version == before[2]
    with torch.inference_mode():
        pages, tables = pages_and_tables()
        rk.append_kv(torch.ones(1, 1, 8), torch.ones(1, 1, 8), pages, pages.clone(), *tables, backend=backend)
    assert pages[0, 0, 0, 0] == 1


@pytest.mark.parametrize("which", ["k_pages", "v_pages"])
def test_pages_that_require_grad_are_refused(which):
    pages, tables = pages_and_tables()
    leaf, row = pages.clone().requires_grad_(), torch.ones(1, 1, 8)
    for given in (leaf, leaf * 1):
        both = (given, pages) if which == "k_pages" else (pages, given)
        with pytest.raises(RuntimeError, match=f"{which}: requires grad, needs pages without"):
            rk.append_kv(row, row, *both, *tables)
        assert not given.any()
    with torch.no_grad():
        rk.append_kv(row, row, leaf, leaf, *tables)
    assert leaf[0, 0, 0, 0] == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_get_no_history(backend):
    rows = torch.ones(1, 1, 8, requires_grad=True)
    pages = torch.zeros(2, 4, 1, 8), torch.zeros(2, 4, 1, 8)
    for _ in range(2):  # pages with a history would be refused
        rk.append_kv(rows, rows, *pages, int32(1)[None], int32(1), int32(0, 1), backend=backend)
    assert not pages[0].requires_grad and not pages[1].requires_grad and pages[0][1, 0].eq(1).all()
