"""Who else computes attention: torch's SDPA and flex_attention, and the libraries that need a GPU.

Each function takes q [T, H_q, D], k and v [T, H_kv, D] and returns a call that gives [T, H_q, D], or raises Skip.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F

from bench.case import Skip
from bench.prompts import SHARED, Passages

Attention = Callable[[], torch.Tensor]


def batched(tensor: torch.Tensor) -> torch.Tensor:
    """Return [T, H, D] as SDPA wants it, [1, H, T, D]."""
    return tensor.transpose(0, 1)[None]


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, **options) -> Attention:
    a = [batched(t) for t in (q, k, v)]
    return lambda: F.scaled_dot_product_attention(*a, mask, enable_gqa=True, **options)[0].transpose(0, 1)


def sdpa_float64(q, k, v, mask: torch.Tensor | None = None, **options) -> Attention:
    """What all of them are compared with."""
    return lambda: sdpa(q.double(), k.double(), v.double(), mask, **options)()


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> Attention:
    """Scores, softmax and product as a model's eager attention writes them."""
    group = q.shape[1] // k.shape[1]

    def call() -> torch.Tensor:
        keys, values = (t.repeat_interleave(group, 1).transpose(0, 1) for t in (k, v))
        scores = q.transpose(0, 1) @ keys.transpose(1, 2) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ values).transpose(0, 1)

    return call


def sdpa_looped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, passages: Passages) -> Attention:
    """SDPA span by span, the keys of prefix and passage put together."""
    starts = [0]
    for length in passages.spans():
        starts.append(starts[-1] + length)
    bq, bk, bv = (batched(t) for t in (q, k, v))

    def call() -> torch.Tensor:
        pieces = []
        for number, (start, end) in enumerate(zip(starts, starts[1:])):
            if number == 0:
                keys, values = bk[:, :, :end], bv[:, :, :end]
            elif number == len(starts) - 2:
                keys, values = bk, bv
            else:
                keys = torch.cat([bk[:, :, :SHARED], bk[:, :, start:end]], 2)
                values = torch.cat([bv[:, :, :SHARED], bv[:, :, start:end]], 2)
            pieces.append(F.scaled_dot_product_attention(bq[:, :, start:end], keys, values, enable_gqa=True))
        return torch.cat(pieces, 2)[0].transpose(0, 1)

    return call


def block_mask(passages: Passages, block: int, device: str):
    """Return flex_attention's block mask of the passages."""
    from torch.nn.attention.flex_attention import create_block_mask

    span, last = passages.span_of_row()
    span = span.to(device)

    def allowed(b, h, i, j):
        return (span[i] == span[j]) | (span[j] == 0) | (span[i] == last)

    return create_block_mask(allowed, None, None, passages.rows, passages.rows, device=device, BLOCK_SIZE=block)


def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, passages: Passages, block: int) -> Attention:
    from torch.nn.attention.flex_attention import flex_attention

    mask = block_mask(passages, block, q.device.type)
    # Beyond its limit, 8 kernels of one function, dynamo runs flex_attention uncompiled: that would not be this peer.
    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    compiled = torch.compile(flex_attention, dynamic=False)
    a = [batched(t) for t in (q, k, v)]
    return lambda: compiled(*a, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def _library(name: str, q: torch.Tensor) -> ModuleType:
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        raise Skip("not installed")
    if q.device.type != "cuda":
        raise Skip(f"runs on CUDA tensors only, got {q.device.type}")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise Skip("runs in float16 and bfloat16 only")
    return importlib.import_module(name)


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Attention:
    library = _library("flash_attn", q)
    return lambda: library.flash_attn_func(q[None], k[None], v[None], causal=causal)[0]


def flashinfer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Attention:
    library = _library("flashinfer", q)
    return lambda: library.single_prefill_with_kv_cache(q, k, v, causal=causal)


def xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Attention:
    library = _library("xformers.ops", q)
    group = q.shape[1] // k.shape[1]
    # Its grouped form has five dimensions: batch, rows, key/value heads, heads of a group, width.
    grouped = q.unflatten(1, (k.shape[1], group))[None]
    keys, values = (t[None, :, :, None].expand(-1, -1, -1, group, -1) for t in (k, v))
    bias = library.LowerTriangularMask() if causal else None
    return lambda: library.memory_efficient_attention(grouped, keys, values, attn_bias=bias)[0].flatten(1, 2)


def dense_libraries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> dict[str, Attention]:
    """Return the GPU libraries' attention without a mask of chunks; what can't run here raises Skip when called."""
    makers = {"FlashAttention": flash_attention, "FlashInfer": flashinfer, "xformers": xformers}
    return {name: late(lambda make=make: make(q, k, v, causal)) for name, make in makers.items()}


def late(make: Callable[[], Attention]) -> Attention:
    """Put off ``make``, which may compile or raise Skip, to the first call."""
    made: list[Attention] = []

    def call() -> torch.Tensor:
        if not made:
            made.append(make())
        return made[0]()

    return call


def vllm_overlay(rows: torch.Tensor, embeds: torch.Tensor, is_text: torch.Tensor) -> Callable[[], None]:
    """Return the call of vLLM's kernel that writes a request's prompt embeddings over the rows of a batch.

    ``rows`` and ``embeds`` are ``[N, d]``; ``is_text`` is uint8 ``[N]``, where the rows stay. One request, whole.
    """
    library = _library("vllm.v1.worker.gpu.model_states.prompt_embeds", rows)
    count, device = len(rows), rows.device
    pointers = [torch.tensor([t.data_ptr()], dtype=torch.uint64, device=device) for t in (embeds, is_text)]
    lengths, none = (torch.tensor([n], dtype=torch.int32, device=device) for n in (count, 0))
    starts = torch.tensor([0, count], dtype=torch.int32, device=device)
    block = library.TOKEN_BLOCK
    kernel = library._apply_prompt_embeds_kernel[(1, -(-count // block))]
    arguments = (rows, rows.stride(0), *pointers, lengths, none, starts, none, rows.shape[1])

    def call(_alive: object = (embeds, is_text)) -> None:  # the kernel is given their addresses alone
        kernel(*arguments, TOKEN_BLOCK=block, BLOCK_SIZE=1024)

    return call
