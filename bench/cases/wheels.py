"""Attention from wheels that need a GPU: FlashAttention-3 and -4, FlashInfer, cuDNN's flex_attention, xformers.

Each function takes q [T, H_q, D], k and v [T, H_kv, D] and returns a call that gives [T, H_q, D], or raises Skip.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch

from bench.cases.problems import Problem
from bench.engine.case import Skip

Attention = Callable[[], torch.Tensor]
# q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal
Sequences = Callable[..., torch.Tensor]


def library(name: str, q: torch.Tensor) -> ModuleType:
    """Import a library if it runs on ``q``.

    Raises
    ------
    Skip
        If it is not installed, can't be imported, or doesn't support such tensors.
    """
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        raise Skip("not installed")
    if q.device.type != "cuda":
        raise Skip(f"runs on CUDA tensors only, got {q.device.type}")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise Skip("runs in float16 and bfloat16 only")
    try:
        return importlib.import_module(name)
    except Exception as error:  # a wheel for another torch can fail in any way
        raise Skip(f"{type(error).__name__} at import: {str(error).partition(chr(10))[0][:200]}") from None


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Attention:
    module = library("flash_attn", q)
    if not hasattr(module, "flash_attn_func"):  # FlashAttention-4 installs a folder of this name
        raise Skip("not installed")
    return lambda: module.flash_attn_func(q[None], k[None], v[None], causal=causal)[0]


def flashinfer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Attention:
    module = library("flashinfer", q)
    return lambda: module.single_prefill_with_kv_cache(q, k, v, causal=causal)


def xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Attention:
    module = library("xformers.ops", q)
    group = q.shape[1] // k.shape[1]
    # Its grouped layout has five dimensions: batch, rows, key/value heads, heads per group, head_dim.
    grouped = q.unflatten(1, (k.shape[1], group))[None]
    keys, values = (t[None, :, :, None].expand(-1, -1, -1, group, -1) for t in (k, v))
    bias = module.LowerTriangularMask() if causal else None
    return lambda: module.memory_efficient_attention(grouped, keys, values, attn_bias=bias)[0].flatten(1, 2)


def torch_varlen(q: torch.Tensor) -> Sequences:
    """``torch.nn.attention.varlen``, which needs no wheel."""
    if q.device.type != "cuda":
        raise Skip(f"runs on CUDA tensors only, got {q.device.type}")
    from torch.nn.attention.varlen import varlen_attn

    # Later releases of torch require a flag for grouped heads.
    options = {"enable_gqa": True} if "enable_gqa" in (varlen_attn.__kwdefaults__ or {}) else {}

    def call(q, k, v, starts_q, starts_k, most_q, most_k, causal):
        window = (-1, 0) if causal else (-1, -1)
        return varlen_attn(q, k, v, starts_q, starts_k, most_q, most_k, window_size=window, **options)

    return call


def fa3(q: torch.Tensor) -> Sequences:
    """FlashAttention-3 from the wheel fa3-fwd, whose op is called directly."""
    library("fa3_fwd._C", q)
    op = torch.ops.fa3_fwd.fwd

    def call(q, k, v, starts_q, starts_k, most_q, most_k, causal):
        where = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k, "max_seqlen_q": most_q, "max_seqlen_k": most_k}
        return op(q, k, v, **where, is_causal=causal)[0]

    return call


def fa4(q: torch.Tensor) -> Sequences:
    """FlashAttention-4 from the wheel flash-attn-4."""
    module = library("flash_attn.cute", q)

    def call(q, k, v, starts_q, starts_k, most_q, most_k, causal):
        where = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k, "max_seqlen_q": most_q, "max_seqlen_k": most_k}
        return module.flash_attn_varlen_func(q, k, v, **where, causal=causal)[0]

    return call


def in_pieces(
    make: Callable[[torch.Tensor], Sequences], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem
) -> Attention:
    """Return attention over a problem's pieces by a varlen library; each call copies the keys that pieces share."""
    run = make(q)
    if problem.pieces is None:
        raise Skip("its sequences can't express this mask")
    rows = [count for count, _ in problem.pieces]
    keys = [sum(end - start for start, end in ranges) for _, ranges in problem.pieces]
    starts = [torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32) for counts in (rows, keys)]
    where = (*(t.to(q.device) for t in starts), max(rows), max(keys), problem.causal)
    index = problem.keys_of_pieces()
    if index is None:
        return lambda: run(q, k, v, *where)
    gathered = torch.tensor(index, device=q.device)
    return lambda: run(q, k[gathered], v[gathered], *where)


def cudnn_flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> Attention:
    """cuDNN's flex_attention from the wheel nvidia-cudnn-frontend, with its plan made in advance."""
    module = library("cudnn.flex_attention", q)
    batch = [t[None] for t in (q, k, v)]
    plan = cudnn_flex_plan(q, k, v, problem)
    return lambda: module.flex_attn_func(*batch, mask_plan=plan)[0]


def cudnn_flex_plan(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> object:
    module = library("cudnn.flex_attention", q)
    # Each row's intervals: [0, F0) and [F1, F2).
    return module.create_mask_plan(problem.ranges.to(q.device)[None].contiguous(), *(t[None] for t in (q, k, v)))
