"""Every op computes shapes on the meta device."""

import pytest
import torch

import refrag_kernels as rk

rows, pages = torch.empty(7, 4, 8, device="meta"), torch.empty(2, 16, 4, 8, device="meta")
plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[4, 1], [2]])).to("meta")
w1, w2 = torch.empty(16, 8, device="meta"), torch.empty(24, 16, device="meta")
chunks, table = torch.empty(3, 8, device="meta"), torch.empty(9, 24, device="meta")


def int32(*shape):
    return torch.empty(shape, dtype=torch.int32, device="meta")


CALLS = {
    "mixed_attention": (lambda: rk.mixed_attention(rows, rows, rows, plan), (7, 4, 8)),
    "attention_received": (lambda: rk.attention_received(rows, rows, torch.empty(7, 4, device="meta"), plan), (7, 4)),
    "select_chunk_rows": (lambda: rk.select_chunk_rows(rows, rows, int32(3), int32(3), 5)[0], (5, 4, 8)),
    "paged_attention": (lambda: rk.paged_attention(rows, pages, pages, int32(7, 2), int32(7)), (7, 4, 8)),
    "merge_states": (lambda: rk.merge_states(rows, rows[..., 0], rows, rows[..., 0])[0], (7, 4, 8)),
    "pool_chunks": (lambda: rk.pool_chunks(chunks, int32(3), "mean"), (2, 8)),
    "project_chunks": (lambda: rk.project_chunks(chunks, w1, None, w2), (3, 24)),
    "packed projection": (
        lambda: rk.project_chunks(chunks, rk.PackedProjection.from_weights(w1, None, w2, None)),
        (3, 24),
    ),
    "embed_mixed": (lambda: rk.embed_mixed(int32(5).long(), table, chunks, int32(5), w1, None, w2), (5, 24)),
    "linear_rows": (lambda: rk.linear_rows(chunks, w1), (3, 16)),
}


@pytest.mark.parametrize("op", CALLS)
def test_shapes(op):
    call, shape = CALLS[op]
    out = call()
    assert out.shape == shape and out.is_meta


def test_append_kv():
    assert rk.append_kv(rows, rows, pages, pages, int32(7, 2), int32(7), int32(8)) is None


def test_bad_input_is_still_refused():
    with pytest.raises(ValueError, match=r"v: got shape \[6, 4, 8\], needs \[7, 4, 8\]"):
        rk.mixed_attention(rows, rows, rows[:6], plan)
