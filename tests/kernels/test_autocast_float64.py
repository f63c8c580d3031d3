"""Under autocast, which does not cast float64, mixing a float64 argument with others raises an error that names it."""

import pytest
import torch

import refrag_kernels as rk

layout = rk.ChunkLayout.from_lengths([[4]])
plan = rk.plan_attention(layout)
rows = torch.randn(4, 1, 8)
pages, table, lengths = torch.randn(1, 16, 1, 8), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
offsets = torch.tensor([0, 1], dtype=torch.int32)
w1, w2, bias, chunks = torch.randn(16, 8), torch.randn(8, 16), torch.randn(16), torch.randn(3, 8)
ids, slots = torch.zeros(4, dtype=torch.int64), torch.tensor([-1, 0, 1, -1], dtype=torch.int32)
vocabulary = torch.randn(5, 8)

CALLS = {
    "mixed_attention": (rk.mixed_attention, {"q": rows, "k": rows, "v": rows}, (plan,)),
    "attention_received": (rk.attention_received, {"q": rows, "k": rows}, (rows[..., 0].contiguous(), plan)),
    "select_chunk_rows": (rk.select_chunk_rows, {"k": rows, "v": rows}, (offsets * 4, offsets, 1)),
    "paged_attention": (rk.paged_attention, {"q": rows[:1], "k_pages": pages, "v_pages": pages}, (table, lengths)),
    "append_kv": (
        rk.append_kv,
        {"k": rows[:1], "v": rows[:1], "k_pages": pages, "v_pages": pages},
        (table, lengths, offsets),
    ),
    "project_chunks": (rk.project_chunks, {"chunks": chunks, "w1": w1, "b1": bias, "w2": w2}, ()),
    "linear_rows": (rk.linear_rows, {"x": chunks, "weight": w1, "bias": bias}, ()),
}


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, (_, tensors, _) in CALLS.items() for name in tensors])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_one_float64_argument_is_refused(op, name, backend):
    call, tensors, rest = CALLS[op]
    for others in (torch.float32, torch.bfloat16):
        mixed = {key: tensor.double() if key == name else tensor.to(others) for key, tensor in tensors.items()}
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"^\w+: got dtype .*, needs "):
            call(*mixed.values(), *rest, backend=backend)


@pytest.mark.parametrize("name", ["token_table", "chunks", "w1", "b1", "w2"])
def test_embed_mixed(name):
    tensors = {"token_table": vocabulary, "chunks": chunks, "w1": w1, "b1": bias, "w2": w2}
    tensors[name] = tensors[name].double()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"^\w+: got dtype .*, needs "):
        rk.embed_mixed(
            ids, tensors["token_table"], tensors["chunks"], slots, tensors["w1"], tensors["b1"], tensors["w2"]
        )


def test_float64_alone_stays_float64():
    with torch.autocast("cpu", torch.bfloat16):
        out = rk.mixed_attention(rows.double(), rows.double(), rows.double(), plan)
        projected = rk.project_chunks(chunks.double(), w1.double(), None, w2.double())
        decoded = rk.paged_attention(rows[:1].double(), pages.double(), pages.double(), table, lengths)
    assert out.dtype == projected.dtype == decoded.dtype == torch.float64
