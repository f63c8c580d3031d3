"""The ops with torch.export and fake CUDA tensors: nothing runs, so no GPU is needed."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

import refrag_kernels as rk


def on_cuda(plan):
    """Return a plan of fake tensors; its tile lists are created on the CPU, as for a plan that is moved."""
    return torch.utils._pytree.tree_map(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"), plan)


class Attention(torch.nn.Module):
    def forward(self, q, k, v, plan):
        return rk.mixed_attention(q, k, v, plan, return_lse=True, backend="triton")


class Embed(torch.nn.Module):
    def forward(self, ids, table, chunks, slots, w1, w2):
        return rk.embed_mixed(ids, table, chunks, slots, w1, None, w2, None, backend="triton")


class Project(torch.nn.Module):
    def forward(self, chunks, w1, b1, w2, b2):
        return rk.project_chunks(chunks, w1, b1, w2, b2, backend="triton")


class Pool(torch.nn.Module):
    def forward(self, hidden, offsets):
        return rk.pool_chunks(hidden, offsets, "mean", backend="triton")


class Merge(torch.nn.Module):
    def forward(self, out_a, lse_a, out_b, lse_b):
        return rk.merge_states(out_a, lse_a, out_b, lse_b, backend="triton")


class Append(torch.nn.Module):
    def forward(self, k, pages, table, lengths, offsets):
        written = pages.clone()
        rk.append_kv(k, k, written, pages.clone(), table, lengths, offsets, backend="triton")
        return written


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


def project_inputs():
    return lambda: (empty(5, 16), empty(24, 16), empty(24), empty(32, 24), empty(32))


def pool_inputs():
    return lambda: (empty(30, 16), empty(4, dtype=torch.int32))


def merge_inputs():
    state = lambda: (empty(6, 2, 16), empty(6, 2, dtype=torch.float32))  # noqa: E731
    return lambda: (*state(), *state())


def append_inputs():
    tables = lambda: (empty(2, 4, dtype=torch.int32), empty(2, dtype=torch.int32), empty(3, dtype=torch.int32))  # noqa: E731
    return lambda: (empty(7, 2, 64), empty(9, 16, 2, 64), *tables())


CALLS = pytest.mark.parametrize(
    ("module", "inputs", "op"),
    [
        (Attention, attention_inputs, "mixed_attention"),
        (Embed, embed_inputs, "embed_mixed"),
        (Project, project_inputs, "project_chunks"),
        (Pool, pool_inputs, "pool_chunks"),
        (Merge, merge_inputs, "merge_states"),
        (Append, append_inputs, "append_kv"),
        (Decode, decode_inputs, "paged_attention"),
    ],
)


def check(graphs, op):
    """Check that the graph has the op once, with its backend, and with results on the GPU."""
    wanted = getattr(torch.ops.refrag, op).default
    # An op that mutates its arguments is the first argument of its functionalized form.
    nodes = [node for graph in graphs for node in graph.nodes if wanted in (node.target, *node.args[:1])]
    assert len(nodes) == 1 and nodes[0].kwargs["backend"] == "triton"
    values = nodes[0].meta.get("val")
    for value in values if isinstance(values, tuple) else (values,):
        assert value is None or value.device.type == "cuda"


@CALLS
def test_export_with_fake_cuda_tensors(module, inputs, op):
    make = inputs()
    with FakeTensorMode():
        args = make()
        program = torch.export.export(module(), args)
    check([program.graph], op)


@CALLS
def test_compiles_in_one_graph_with_fake_cuda_tensors(module, inputs, op):
    make, graphs = inputs(), []

    def keep(graph, example_inputs):
        graphs.append(graph.graph)
        return graph.forward

    torch._dynamo.reset()
    with FakeTensorMode():
        args = make()
        out = torch.compile(module(), fullgraph=True, backend=aot_autograd(fw_compiler=keep))(*args)
    check(graphs, op)
    assert all(value.device.type == "cuda" for value in (out if isinstance(out, tuple) else (out,)))
