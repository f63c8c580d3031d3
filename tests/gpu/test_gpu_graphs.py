"""Captured CUDA graphs replay on changed values, plans and caches; a dry run repeats the call instead."""

import pytest
import torch

import refrag_kernels as rk
from refrag_kernels import attention, paged
from tests.support.accuracy import LSE, OUTPUT, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DRY_RUN = DEVICE == "cpu"
BF16 = torch.bfloat16
BACKENDS = ("triton", pytest.param("cuda", marks=pytest.mark.skipif(DRY_RUN, reason="needs a CUDA device")))


def captured(call):
    """Return a call's result, and a function that replays the call into the same tensors."""
    if DRY_RUN:
        results = call()

        def replay():
            for old, new in zip(results, call()):
                old.copy_(new)

        return results, replay
    call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return results, graph.replay


def random(*shape):
    return torch.randn(*shape).to(DEVICE, BF16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_replays_on_a_refilled_plan(backend):
    """One graph serves smaller and larger batches with other layouts and masks; rows beyond a batch are zero."""
    torch.manual_seed(0)
    batches = [
        (rk.ChunkLayout.from_lengths([[40, 1, 1, 30], [17]]), None, True),
        (rk.ChunkLayout.from_lengths([[16, 16, 16, 40]]), rk.ChunkMask.passages([-1, 0, 1, -1]), False),
        (rk.ChunkLayout.from_lengths([[128]]), None, True),
        (rk.ChunkLayout.from_lengths([[3]]), None, True),
    ]
    capacity = rk.PlanCapacity.for_rows(128, sequences=4)
    q, k, v = (random(128, heads, 64) for heads in (4, 2, 2))
    layout, mask, causal = batches[0]
    plan = rk.plan_attention(layout, mask, causal=causal, capacity=capacity, device=DEVICE)

    def call():
        return attention.mixed_attention(q, k, v, plan, return_lse=True, backend=backend)

    with torch.inference_mode():
        (out, lse), replay = captured(call)
        for layout, mask, causal in batches:
            for tensor in (q, k, v):
                tensor.copy_(random(*tensor.shape))
            rk.plan_attention(layout, mask, causal=causal, capacity=capacity, out=plan, device=DEVICE)
            replay()
            rows = layout.total_rows
            wide = [tensor[:rows].double().cpu() for tensor in (q, k, v)]
            exact = rk.plan_attention(layout, mask, causal=causal)
            expected, expected_lse = rk.mixed_attention(*wide, exact, return_lse=True)
            assert relative_error(out[:rows].cpu(), expected) <= OUTPUT[BF16]
            assert relative_error(lse[:rows].cpu(), expected_lse) <= LSE[BF16]
            assert not out[rows:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_replays_while_the_cache_grows(backend):
    """Append a row to two sequences' pages and attend: each replay has one more key, in a wider table."""
    torch.manual_seed(1)
    pages, page = 24, 16
    k_pages, v_pages = (torch.zeros(pages, page, 2, 64, dtype=BF16, device=DEVICE) for _ in range(2))
    table = torch.randperm(pages)[:16].view(2, 8).to(DEVICE, torch.int32)
    lengths = torch.ones(2, dtype=torch.int32, device=DEVICE)
    offsets = torch.arange(3, dtype=torch.int32, device=DEVICE)
    q, k, v = random(2, 4, 64), random(2, 2, 64), random(2, 2, 64)
    keys, values = torch.zeros(2, 40, 2, 64, dtype=BF16), torch.zeros(2, 40, 2, 64, dtype=BF16)

    def call():
        paged.append_kv(k, v, k_pages, v_pages, table, lengths, offsets, backend=backend)
        return paged.paged_attention(q, k_pages, v_pages, table, lengths, return_lse=True, backend=backend)

    with torch.inference_mode():
        (out, lse), replay = captured(call)
        for step in range(40 if DEVICE == "cuda" else 3):
            for tensor in (q, k, v):
                tensor.copy_(random(*tensor.shape))
            lengths.fill_(step + 1)
            keys[:, step], values[:, step] = k.cpu(), v.cpu()
            replay()
            plan = rk.plan_attention(
                rk.ChunkLayout.from_lengths([[1], [1]]),
                kv_layout=rk.ChunkLayout.from_lengths([[step + 1]] * 2),
            )
            there = [cache[:, : step + 1].flatten(0, 1).double() for cache in (keys, values)]
            expected, expected_lse = rk.mixed_attention(q.double().cpu(), *there, plan, return_lse=True)
            assert relative_error(out.cpu(), expected) <= OUTPUT[BF16], step
            assert relative_error(lse.cpu(), expected_lse) <= LSE[BF16], step
