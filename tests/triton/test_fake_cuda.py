"""The ops as torch.export and fake tensors see them on a GPU: nothing runs, so none has to be there."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import refrag_kernels as rk


def on_cuda(plan):
    """Return a plan of fake tensors; its tile lists are made on the CPU, as for a plan that is moved."""
    return torch.utils._pytree.tree_map(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"), plan)


class Attention(torch.nn.Module):
    def forward(self, q, k, v, plan):
        return rk.mixed_attention(q, k, v, plan, return_lse=True, backend="triton")


class Embed(torch.nn.Module):
    def forward(self, ids, table, chunks, slots, w1, w2):
        return rk.embed_mixed(ids, table, chunks, slots, w1, None, w2, None, backend="triton")


class Decode(torch.nn.Module):
    def forward(self, q, pages, table, lengths):
        return rk.paged_attention(q, pages, pages, table, lengths, backend="triton")


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="cuda")


def attention_inputs():
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[30, 1, 1]]))
    return lambda: (empty(32, 4, 64), empty(32, 2, 64), empty(32, 2, 64), on_cuda(plan))


def embed_inputs():
    integers = torch.int64, torch.int32
    return lambda: (
        empty(8, dtype=integers[0]), empty(50, 32), empty(3, 16), empty(8, dtype=integers[1]), empty(24, 16),
        empty(32, 24),
    )  # fmt: skip


def decode_inputs():
    return lambda: (
        empty(2, 4, 64), empty(9, 16, 2, 64), empty(2, 4, dtype=torch.int32), empty(2, dtype=torch.int32)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("module", "inputs", "op"),
    [
        (Attention, attention_inputs, "mixed_attention"),
        (Embed, embed_inputs, "embed_mixed"),
        (Decode, decode_inputs, "paged_attention"),
    ],
)
def test_export_with_fake_cuda_tensors(module, inputs, op):
    make = inputs()
    with FakeTensorMode():
        args = make()
        program = torch.export.export(module(), args)
    nodes = [node for node in program.graph.nodes if node.target == getattr(torch.ops.refrag, op).default]
    assert len(nodes) == 1 and nodes[0].kwargs["backend"] == "triton"
    values = nodes[0].meta["val"]
    for value in values if isinstance(values, tuple) else (values,):
        assert value.device.type == "cuda"
