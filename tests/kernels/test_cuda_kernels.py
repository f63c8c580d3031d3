"""The CUDA backend: what it is registered for, what it leaves to others, and its values if there is a GPU."""

import pytest
import torch

import refrag_kernels as rk
from refrag_kernels import extension, support
from refrag_kernels.cuda_kernels import projection
from refrag_kernels.registration import values_are_checked
from tests.support.accuracy import LSE, OUTPUT, relative_error
from tests.support.factory import random_attention_problem
from tests.support.paged_problems import make_problem

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
HALF = [torch.bfloat16, torch.float16]
OPS = (
    "append_kv",
    "assemble_mixed",
    "merge_states",
    "mixed_attention",
    "paged_attention",
    "pool_chunks",
    "project_chunks",
)


@pytest.mark.parametrize("op", OPS)
def test_every_kernel_is_registered_for_cuda(op):
    assert extension.load_error() is None
    if not torch.ops.refrag_cuda.architectures():
        pytest.skip("built without CUDA kernels")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"refrag_cuda::{op}", "CUDA")


def unsupported(op, *args):
    return support.OPS[op].implementations["cuda"].unsupported(args)


@pytest.mark.parametrize(
    ("head_dim", "first", "dtype", "message"),
    [
        (80, 0, torch.bfloat16, "head_dim 80"),
        (64, 0, torch.float32, "dtype float32"),
        (64, 4, torch.float16, "q has rows that don't start at multiples of 16 bytes"),
    ],
)
def test_what_attention_leaves_to_other_backends(head_dim, first, dtype, message):
    q = torch.zeros(4, 2, head_dim + first, dtype=dtype)[..., first:]
    pages = torch.zeros(2, 16, 2, head_dim, dtype=dtype)
    assert unsupported("mixed_attention", q, pages[0], pages[0]) == message
    assert unsupported("paged_attention", q, pages, pages) == message


def test_what_attention_takes():
    for head_dim in (64, 96, 128):
        q, k, v = (torch.zeros(4, 2, head_dim + 8, dtype=torch.bfloat16)[..., :head_dim] for _ in range(3))
        assert unsupported("mixed_attention", q, k, v) is None


def test_what_the_projection_leaves_to_torch_and_to_other_backends():
    w1, w2 = torch.zeros(64, 32).half(), torch.zeros(16, 64).half()
    not_small_m = projection._not_small_m
    assert not_small_m(torch.zeros(64, 32).half(), w1, None, w2, None, "gelu", None) is None
    assert not_small_m(torch.zeros(65, 32).half(), w1, None, w2, None, "gelu", None) == "65 chunks"
    assert not_small_m(torch.zeros(2, 32), w1.float(), None, w2.float(), None, "gelu", None) == "dtype float32"
    assert "hidden sizes 12" in not_small_m(torch.zeros(2, 12).half(), w1[:, :12], None, w2, None, "gelu", None)

    before = torch.get_float32_matmul_precision()
    try:
        for op, first in (("project_chunks", 0), ("embed_mixed", 1)):
            leading = (None,) * first
            for precision, said in (("highest", None), ("high", "single pass of TF32")):
                torch.set_float32_matmul_precision(precision)
                reason = unsupported(op, *leading, torch.zeros(65, 32), w1, None, w2, None, "gelu", None)
                assert reason is None if said is None else said in reason
                assert unsupported(op, *leading, torch.zeros(65, 32).half(), w1, None, w2, None, "gelu", None) is None
            assert unsupported(op, *leading, torch.zeros(65, 32).double()) == "dtype float64"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_many_chunks_are_projected_by_torch(dtype):
    torch.manual_seed(0)
    chunks, *weights = (torch.randn(*shape) for shape in ((65, 32), (64, 32), (64,), (16, 64), (16,)))
    args = [t.to(dtype) for t in (chunks, *weights)]
    out = projection.project_chunks(*args, "gelu", None)
    expected = rk.project_chunks(*(t.double() for t in args), backend="reference")
    assert relative_error(out, expected) <= OUTPUT[dtype]


def test_values_are_not_checked_within_a_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setenv("REFRAG_KERNELS_CHECK", "1")
    with pytest.raises(RuntimeError, match="REFRAG_KERNELS_CHECK=1 reads indices on the host"):
        values_are_checked()
    monkeypatch.setenv("REFRAG_KERNELS_CHECK", "0")
    assert not values_are_checked()


@needs_gpu
def test_a_graph_replays_on_new_values():
    q, k, v = (torch.randn(64, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[64]]), device="cuda")
    rk.mixed_attention(q, k, v, plan, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rk.mixed_attention(q, k, v, plan, backend="cuda")
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(out, rk.mixed_attention(q, k, v, plan, backend="cuda"))


@needs_gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("seed", range(40))
def test_attention(seed, dtype):
    problem = random_attention_problem(seed, dtype, head_dims=(64, 96, 128))
    q, k, v = (getattr(problem, name).cuda() for name in "qkv")
    options = {name: value.cuda() if torch.is_tensor(value) else value for name, value in problem.options.items()}
    plan = problem.plan_problem.plan(device="cuda")
    out, lse = rk.mixed_attention(q, k, v, plan, return_lse=True, backend="cuda", **options)
    expected = problem.expected()
    assert relative_error(out.cpu(), expected["out"]) <= OUTPUT[dtype]
    assert relative_error(lse.cpu(), expected["lse"]) <= LSE[dtype]


@needs_gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("rows", [None, [3, 1, 0, 70]])
def test_paged_attention(rows, head_dim, dtype):
    problem = make_problem(
        head_dim, [300, 4000, 0, 70], rows, heads=(8, 2), dim=head_dim, page=16, dtype=dtype, sinks=True, visible=True
    )
    args = (argument.cuda() for argument in problem.args)
    options = {
        name: tuple(t.cuda() for t in value) if name == "visible" else value.cuda() if torch.is_tensor(value) else value
        for name, value in problem.options.items()
    }
    out, lse = rk.paged_attention(*args, return_lse=True, backend="cuda", **options)
    assert relative_error(out.cpu(), problem.out) <= OUTPUT[dtype]
    assert relative_error(lse.cpu(), problem.lse) <= LSE[dtype]


@needs_gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("chunks", [1, 9, 64, 200])
def test_projection_and_assembly(chunks, dtype):
    torch.manual_seed(chunks)
    weights = [torch.randn(512, 384) / 20, torch.randn(512), torch.randn(1024, 512) / 20, torch.randn(1024)]
    rows, table = torch.randn(chunks, 384), torch.randn(100, 1024)
    slots = torch.full((chunks + 50,), -1, dtype=torch.int32)
    slots[20 : 20 + chunks] = torch.arange(chunks, dtype=torch.int32)
    ids = torch.randint(0, 100, slots.shape)
    args = [t.to(dtype).cuda() for t in (table, rows)], [t.to(dtype).cuda() for t in weights]
    (table, rows), weights = args
    mixed = rk.embed_mixed(ids.cuda(), table, rows, slots.cuda(), *weights, token_scale=2.0, backend="cuda")
    expected = rk.embed_mixed(
        ids.cuda(), table.double(), rows.double(), slots.cuda(), *(w.double() for w in weights), token_scale=2.0,
        backend="reference",
    )  # fmt: skip
    assert relative_error(mixed, expected) <= OUTPUT[dtype]
