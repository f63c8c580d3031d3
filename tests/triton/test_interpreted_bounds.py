"""Offsets beyond 2^31 elements, and invalid indices: memory around a tensor is neither read nor written."""

import pytest
import torch

import refrag_kernels as rk
from refrag_kernels.triton_kernels import paged, projection
from tests.support.accuracy import OUTPUT, relative_error
from tests.support.paged_problems import assert_rows_close, make_problem


@pytest.fixture(autouse=True)
def memory_that_is_not_touched(monkeypatch):
    # Filling would allocate all of the tensors' memory, most of which is only virtual.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


def spread(tensor, strides):
    """Return a copy of a tensor with these strides: gigabytes of addresses, of which few are touched."""
    size = sum((length - 1) * stride for length, stride in zip(tensor.shape, strides)) + 1
    there = torch.empty(size, dtype=tensor.dtype).as_strided(tensor.shape, strides)
    return there.copy_(tensor)


def test_pages_with_keys_far_apart():
    """Key 15 of a page starts 15 * 2^28 elements into it."""
    problem = make_problem(0, [16, 30], page=16, dtype=torch.bfloat16)
    q, k_pages, v_pages, table, lengths = problem.args
    used = torch.zeros_like(table)
    pages = [torch.zeros(3, 16, 2, 16, dtype=torch.bfloat16) for _ in range(2)]
    places = {}
    for b, length in enumerate(lengths.tolist()):
        for block in range(-(-length // 16)):
            place = places.setdefault((b, block), len(places))
            used[b, block] = place
            for source, target in zip((k_pages, v_pages), pages):
                target[place] = source[table[b, block]].nan_to_num()
    far = [spread(page, (64, 2**28, 32, 1)) for page in pages]
    out = rk.paged_attention(q, *far, used, lengths, backend="triton")
    assert_rows_close(out, problem.out, OUTPUT, "out")


def test_rows_are_appended_far_apart():
    far = [spread(torch.zeros(1, 16, 1, 16, dtype=torch.bfloat16), (64, 2**28, 16, 1)) for _ in range(2)]
    rows = torch.randn(16, 1, 16).bfloat16()
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([16], dtype=torch.int32)
    rk.append_kv(rows, rows, *far, table, lengths, torch.tensor([0, 16], dtype=torch.int32), backend="triton")
    assert all(torch.equal(pages[0], rows) for pages in far)


def test_states_with_heads_far_apart():
    """Head 39 starts 39 * 2^26 elements into its row."""
    states = [torch.randn(3, 40, 16).bfloat16(), torch.randn(3, 40)] * 2
    far = [spread(states[0], (16, 2**26, 1)), states[1], *states[2:]]
    for got, want in zip(rk.merge_states(*far, backend="triton"), rk.merge_states(*states, backend="triton")):
        assert torch.equal(got, want)


def test_attention_received_of_rows_far_apart():
    """Row 39 starts 39 * 2^26 elements into the queries, and 39 * 2^27 into the keys."""
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[40]]), causal=False)
    q, k = torch.randn(40, 2, 16).bfloat16(), torch.randn(40, 1, 16).bfloat16()
    _, lse = rk.mixed_attention(q, k, k, plan, return_lse=True, backend="reference")
    far = spread(q, (2**26, 16, 1)), spread(k, (2**27, 16, 1))
    want = rk.attention_received(q, k, lse, plan, backend="triton")
    assert torch.equal(rk.attention_received(*far, lse, plan, backend="triton"), want)


def test_rows_far_apart_are_selected():
    """Row 39 starts 39 * 2^26 elements into the keys, values and scores, and into the tables of their rotation."""
    k, v, scores, angles = torch.randn(40, 2, 16), torch.randn(40, 2, 16), torch.randn(40, 2), torch.rand(40, 8)
    offsets = torch.tensor([0, 8, 40], dtype=torch.int32)
    kept = rk.kept_offsets(offsets, [1, 5])
    far_k, far_v = spread(k, (2**26, 32, 1)), spread(v, (2**26, 32, 1))
    tables = {"cos": angles.cos(), "sin": angles.sin()}
    far_tables = {name: spread(table, (2**26, 1)) for name, table in tables.items()}
    for backend in ("triton", "cpu"):
        for near, far in (((scores, {}), (spread(scores, (2**26, 1)), {})), ((None, tables), (None, far_tables))):
            want = rk.select_chunk_rows(k, v, offsets, kept, 6, near[0], **near[1], backend=backend)
            got = rk.select_chunk_rows(far_k, far_v, offsets, kept, 6, far[0], **far[1], backend=backend)
            assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_a_product_over_rows_far_apart():
    """The gradient of a weight sums over rows of chunks, 128 at a time: 128 * 2^24 elements."""
    chunks, weight, grad = torch.randn(150, 16).half(), torch.randn(16, 16).half(), torch.randn(150, 16).half()
    args = (weight, None, torch.eye(16).half(), None, "none")
    got = projection.project_chunks_backward(grad, spread(chunks, (2**24, 1)), *args)
    want = projection.project_chunks_backward(grad.double().float(), chunks.float(), *(
        a.float() if torch.is_tensor(a) else a for a in args))  # fmt: skip
    assert relative_error(got[1], want[1].double()) <= OUTPUT[torch.float16]


def guarded(monkeypatch, module):
    """Put guards around a module's allocations, and return a function that checks them."""
    buffers = []

    def empty(*shape, dtype, device):
        size = torch.Size(shape[0] if isinstance(shape[0], (tuple, torch.Size)) else shape)
        buffer = torch.full((size.numel() + 8192,), 7.0, dtype=dtype, device=device)
        buffers.append((buffer, size.numel()))
        return buffer[4096 : 4096 + size.numel()].view(size)

    monkeypatch.setattr(module.torch, "empty", empty)
    return lambda: all((b[:4096] == 7).all() and (b[4096 + n :] == 7).all() for b, n in buffers) and len(buffers) > 0


@pytest.mark.parametrize("offsets", ([-20, 3, 5], [0, 3, 40], [4, 2, 5], [0, -9, 5]), ids=str)
def test_wrong_offsets_write_nothing_beside_the_output(offsets, monkeypatch):
    problem = make_problem(1, [30, 30], [2, 3], page=16)
    standing = guarded(monkeypatch, paged)
    rows = torch.tensor(offsets, dtype=torch.int32)
    rk.paged_attention(*problem.args, q_offsets=rows, backend="triton")
    assert standing()


def test_wrong_ranges_read_nothing_beside_them():
    """Range offsets before the first or after the last range are clamped to the existing ranges."""
    problem = make_problem(1, [30], [3], page=16)
    everything = torch.tensor([[0, 30]] * 3, dtype=torch.int32)
    around = torch.full((9, 2), -1, dtype=torch.int32)
    around[:3] = torch.tensor([0, 30])  # before the ranges: if read, every key would be visible
    around[3:6] = torch.tensor([5, 7])
    around[6:] = torch.tensor([0, 30])
    options = {"q_offsets": torch.tensor([0, 3], dtype=torch.int32), "backend": "triton"}
    wrong = (torch.tensor([-3, 0, 2, 9], dtype=torch.int32), around[3:6])
    right = (torch.tensor([0, 0, 2, 3], dtype=torch.int32), around[3:6].clone())
    got, want = (rk.paged_attention(*problem.args, visible=ranges, **options) for ranges in (wrong, right))
    assert torch.equal(got, want)
    assert not torch.equal(want, rk.paged_attention(*problem.args, visible=(right[0], everything), **options))


def test_rows_of_no_sequence_are_fully_masked():
    q, pages = torch.randn(4, 2, 16), torch.randn(2, 16, 1, 16)
    table, empty = torch.zeros(0, 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    out, lse = rk.paged_attention(
        q, pages, pages, table, empty, q_offsets=torch.zeros(1, dtype=torch.int32), return_lse=True, backend="triton"
    )
    assert not out.any() and lse.isneginf().all()


def test_values_are_checked_where_that_is_asked_for(monkeypatch):
    monkeypatch.setenv("REFRAG_KERNELS_CHECK", "1")
    pages, table = torch.randn(2, 16, 1, 16), torch.tensor([[7]], dtype=torch.int32)
    lengths, one = torch.tensor([3], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match="page_table"):
        rk.paged_attention(torch.randn(1, 1, 16), pages, pages, table, lengths, backend="triton")
    with pytest.raises(ValueError, match="page_table"):
        rk.append_kv(torch.randn(1, 1, 16), torch.randn(1, 1, 16), pages, pages, table, lengths, one, backend="triton")
    with pytest.raises(ValueError, match="chunk_offsets"):
        rk.pool_chunks(torch.randn(4, 8), torch.tensor([0, 9], dtype=torch.int32), "mean", backend="triton")
    eye, slots = torch.eye(8), torch.tensor([3], dtype=torch.int32)
    with pytest.raises(IndexError, match="slot_of_row"):
        rk.embed_mixed(torch.zeros(1, dtype=torch.int64), eye, eye[:1], slots, eye, None, eye, None, backend="triton")
