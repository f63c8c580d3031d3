"""Attention of the peers: torch's SDPA and flex_attention, and libraries that need a GPU.

Each function takes q [T, H_q, D], k and v [T, H_kv, D] and returns a call that gives [T, H_q, D], or raises Skip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from bench.cases import wheels
from bench.cases.problems import Problem
from bench.engine.case import Skip

Attention = Callable[[], torch.Tensor]


def batched(tensor: torch.Tensor) -> torch.Tensor:
    """Reshape [T, H, D] to SDPA's [1, H, T, D]."""
    return tensor.transpose(0, 1)[None]


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, **options) -> Attention:
    a = [batched(t) for t in (q, k, v)]
    return lambda: F.scaled_dot_product_attention(*a, mask, enable_gqa=True, **options)[0].transpose(0, 1)


def sdpa_float64(q, k, v, mask: torch.Tensor | None = None, **options) -> Attention:
    """SDPA in float64, the reference of all contenders."""
    return lambda: sdpa(q.double(), k.double(), v.double(), mask, **options)()


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> Attention:
    """Float64 attention, a few rows at a time: the reference for a problem's contenders."""
    most = 1 << 28  # bytes of scores

    def call() -> torch.Tensor:
        group, device = q.shape[1] // k.shape[1], q.device.type
        keys, values = (t.double().repeat_interleave(group, 1).transpose(0, 1) for t in (k, v))
        step = max(1, most // (8 * q.shape[1] * problem.rows))
        out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
        for first in range(0, problem.rows, step):
            last = min(first + step, problem.rows)
            scores = q[first:last].double().transpose(0, 1) @ keys.transpose(1, 2) * q.shape[-1] ** -0.5
            scores.masked_fill_(~problem.visible(first, last, device), float("-inf"))
            out[first:last] = (scores.softmax(-1) @ values).transpose(0, 1)
        return out

    return call


def sdpa_in_pieces(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> Attention:
    """SDPA piece by piece over concatenated key ranges; causal pieces must read only their own rows."""
    assert problem.pieces is not None
    bq, bk, bv = (batched(t) for t in (q, k, v))
    options = {"is_causal": problem.causal, "enable_gqa": True}

    def joined(keys: torch.Tensor, ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
        parts = [keys[:, :, start:end] for start, end in ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def call() -> torch.Tensor:
        found, first = [], 0
        for rows, ranges in problem.pieces:
            queries = bq[:, :, first : first + rows]
            found.append(F.scaled_dot_product_attention(queries, joined(bk, ranges), joined(bv, ranges), **options))
            first += rows
        return torch.cat(found, 2)[0].transpose(0, 1)

    return call


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> Attention:
    """Scores, softmax and matmul, as in a model's eager attention."""
    group = q.shape[1] // k.shape[1]

    def call() -> torch.Tensor:
        keys, values = (t.repeat_interleave(group, 1).transpose(0, 1) for t in (k, v))
        scores = q.transpose(0, 1) @ keys.transpose(1, 2) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ values).transpose(0, 1)

    return call


def block_mask(problem: Problem, block: int, device: str):
    """Return flex_attention's block mask of a problem."""
    from torch.nn.attention.flex_attention import create_block_mask

    prefix, start, end = problem.ranges.to(device)

    def allowed(b, h, i, j):
        return (j < prefix[i]) | ((j >= start[i]) & (j < end[i]))

    return create_block_mask(allowed, None, None, problem.rows, problem.rows, device=device, BLOCK_SIZE=block)


def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, block: int) -> Attention:
    from torch.nn.attention.flex_attention import flex_attention

    mask = block_mask(problem, block, q.device.type)
    # Beyond dynamo's limit of 8 recompilations, flex_attention runs uncompiled, which would be a different peer.
    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    compiled = torch.compile(flex_attention, dynamic=False)
    a = [batched(t) for t in (q, k, v)]
    return lambda: compiled(*a, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)


_SDPA = {"cuDNN": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION"}


def forced_sdpa(
    name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, **options
) -> Attention:
    """SDPA with a given backend, "cuDNN" or "flash", instead of the one that torch chooses."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if q.device.type != "cuda":
        raise Skip(f"runs on CUDA tensors only, got {q.device.type}")
    plain, backend = sdpa(q, k, v, mask, **options), getattr(SDPBackend, _SDPA[name])

    def call() -> torch.Tensor:
        with sdpa_kernel(backend):
            return plain()

    return call


def dense_libraries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> dict[str, Attention]:
    """Return GPU libraries for attention without a chunk mask; those that can't run here raise Skip when called."""
    named = _SDPA if q.device.type == "cuda" else ()
    calls = {f"SDPA, {name}": late(lambda name=name: forced_sdpa(name, q, k, v, is_causal=causal)) for name in named}
    makers = {"FlashAttention": wheels.flash_attention, "FlashInfer": wheels.flashinfer, "xformers": wheels.xformers}
    return calls | {name: late(lambda make=make: make(q, k, v, causal)) for name, make in makers.items()}


def masked_libraries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> dict[str, Attention]:
    """Return GPU libraries for a problem's attention; those that can't run here raise Skip when called."""
    makers = {"varlen_attn": wheels.torch_varlen, "FlashAttention-3": wheels.fa3, "FlashAttention-4": wheels.fa4}
    pieces = problem.pieces is not None
    copied = ", keys copied" if pieces and problem.keys_of_pieces() is not None else ""
    calls = {
        name + copied: late(lambda make=make: wheels.in_pieces(make, q, k, v, problem))
        for name, make in makers.items()
        if pieces
    }
    return calls | {"cuDNN flex_attention": late(lambda: wheels.cudnn_flex(q, k, v, problem))}


def flex_late(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem, block: int) -> Attention:
    """flex_attention, compiled on the first call."""
    return late(lambda: flex(q, k, v, problem, block))


def late(make: Callable[[], Attention]) -> Attention:
    """Defer ``make``, which may compile or raise Skip, to the first call."""
    made: list[Attention] = []

    def call() -> torch.Tensor:
        if not made:
            made.append(make())
        return made[0]()

    return call


def vllm_overlay(rows: torch.Tensor, embeds: torch.Tensor, is_text: torch.Tensor) -> Callable[[], None]:
    """Return a call of vLLM's kernel that overwrites rows of a batch with a request's prompt embeddings.

    ``rows`` and ``embeds`` are ``[N, d]``; ``is_text`` is uint8 ``[N]``, 1 for rows to keep. The batch is one request.
    """
    library = wheels.library("vllm.v1.worker.gpu.model_states.prompt_embeds", rows)
    count, device = len(rows), rows.device
    pointers = [torch.tensor([t.data_ptr()], dtype=torch.uint64, device=device) for t in (embeds, is_text)]
    lengths, none = (torch.tensor([n], dtype=torch.int32, device=device) for n in (count, 0))
    starts = torch.tensor([0, count], dtype=torch.int32, device=device)
    block = library.TOKEN_BLOCK
    kernel = library._apply_prompt_embeds_kernel[(1, -(-count // block))]
    arguments = (rows, rows.stride(0), *pointers, lengths, none, starts, none, rows.shape[1])

    def call(_alive: object = (embeds, is_text)) -> None:  # the kernel only gets their addresses
        kernel(*arguments, TOKEN_BLOCK=block, BLOCK_SIZE=1024)

    return call
