"""mixed_attention over the packed rows of a batch of mixed sequences, and the attention that each key received."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch

from refrag_kernels.plan import AttentionPlan
from refrag_kernels.plan_fields import PlanField
from refrag_kernels.registration import register_op
from refrag_kernels.selection import effective_backend
from refrag_kernels.support import HALF, REFERENCE, TENSOR_CORES, Support
from refrag_kernels.validation import (
    FLOAT_DTYPES,
    check_dtype,
    check_heads,
    check_last_contiguous,
    check_same_device,
    check_same_dtype,
    check_score_options,
    check_shape,
    remembered,
)


@remembered
def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    plan_device: torch.device,
    q_rows: int,
    kv_rows: int,
) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_dtype(name, tensor, *FLOAT_DTYPES)
    check_same_dtype(q=q, k=k, v=v)
    check_same_device(q=q, k=k, v=v, sinks=sinks)
    check_shape("q", q, "T_q", "H_q", "D")
    check_shape("k", k, "T_kv", "H_kv", q.shape[2])
    check_shape("v", v, *k.shape)
    check_heads(q, k, sinks)
    check_last_contiguous(q=q, k=k, v=v)
    _check_plan(q, k, plan_device, q_rows, kv_rows)


def _check_plan(q: torch.Tensor, k: torch.Tensor, plan_device: torch.device, q_rows: int, kv_rows: int) -> None:
    if plan_device != q.device:
        raise ValueError(f"plan: got device {plan_device}, needs {q.device}, the device of q")
    for name, tensor, rows in (("q", q, q_rows), ("k", k, kv_rows)):
        if tensor.shape[0] != rows:
            raise ValueError(
                f"plan: got a plan for {rows} rows of {name}, needs one for the {tensor.shape[0]} rows passed"
            )


@remembered
def _check_received(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, plan_device: torch.device, q_rows: int, kv_rows: int
) -> None:
    for name, tensor in (("q", q), ("k", k)):
        check_dtype(name, tensor, *FLOAT_DTYPES)
    check_same_dtype(q=q, k=k)
    check_same_device(q=q, k=k, lse=lse)
    check_shape("q", q, "T_q", "H_q", "D")
    check_shape("k", k, "T_kv", "H_kv", q.shape[2])
    check_heads(q, k, None)
    check_last_contiguous(q=q, k=k)
    check_dtype("lse", lse, torch.float64 if q.dtype == torch.float64 else torch.float32)
    check_shape("lse", lse, *q.shape[:2])
    if not lse.is_contiguous():
        raise ValueError(f"lse: got strides {list(lse.stride())}, needs a contiguous tensor")
    _check_plan(q, k, plan_device, q_rows, kv_rows)


def _fake(q, k, v, plan, scale, softcap, sinks, *, backend=None):
    q_rows, kv_rows = plan[PlanField.Q_ROW_BLOCK].shape[0], plan[PlanField.KV_ROW_BLOCK].shape[0]
    _check(q, k, v, sinks, plan[PlanField.SIZES].device, q_rows, kv_rows)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(q.shape[:2], dtype=lse_dtype)


def _fake_backward(grad_out, grad_lse, q, k, v, out, lse, plan, scale, softcap, sinks, *, backend=None):
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    dsinks = q.new_empty(0, dtype=torch.float32) if sinks is None else torch.empty_like(sinks)
    return dq, dk, dv, dsinks


def _fake_received(q, k, lse, plan, scale, softcap, *, backend=None):
    q_rows, kv_rows = plan[PlanField.Q_ROW_BLOCK].shape[0], plan[PlanField.KV_ROW_BLOCK].shape[0]
    _check_received(q, k, lse, plan[PlanField.SIZES].device, q_rows, kv_rows)
    return lse.new_empty(k.shape[:2])


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    q, k, v, plan, ctx.scale, ctx.softcap, sinks = inputs
    ctx.save_for_backward(q, k, v, sinks, *output, *plan)
    ctx.backend = effective_backend(keyword_only_inputs["backend"])


def _backward(ctx, grad_out, grad_lse):
    q, k, v, sinks, out, lse, *plan = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.contiguous()
    dq, dk, dv, dsinks = torch.ops.refrag.mixed_attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, plan, ctx.scale, ctx.softcap, sinks, backend=ctx.backend
    )
    return dq, dk, dv, [None] * len(plan), None, None, None if sinks is None else dsinks


# Triton's kernels are the faster ones on an H100 (docs/gpu-results.md).
_mixed_attention = register_op(
    "mixed_attention(Tensor q, Tensor k, Tensor v, Tensor[] plan, float scale, float softcap, Tensor? sinks, *, "
    "str? backend) -> (Tensor, Tensor)",
    family="attention",
    support=[
        Support("triton", tile_lists=True),
        Support("cuda", HALF, head_dims=(64, 96, 128), capability=TENSOR_CORES, aligned=("q", "k", "v")),
        Support("cpu", binds=True),
        REFERENCE,
    ],
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("q", "k", "v"),
)
register_op(
    "mixed_attention_backward(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor[] plan, float scale, float softcap, Tensor? sinks, *, str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
    family="attention",
    support=[
        Support("triton", tile_lists=True),
        Support("cuda", missing="has no gradients of attention"),
        Support("cpu", binds=True),
        REFERENCE,
    ],
    fake=_fake_backward,
)
_attention_received = register_op(
    "attention_received(Tensor q, Tensor k, Tensor lse, Tensor[] plan, float scale, float softcap, *, str? backend) "
    "-> Tensor",
    family="attention",
    support=[
        Support("triton", tile_lists=True),
        Support("cuda", missing="has no attention_received"),
        Support("cpu", binds=True),
        REFERENCE,
    ],
    fake=_fake_received,
    autocast=("q", "k"),
)


@overload
def mixed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: torch.Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> torch.Tensor: ...


@overload
def mixed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: torch.Tensor | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def mixed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: torch.Tensor | None = ...,
    return_lse: bool = ...,
    backend: str | None = ...,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...


def mixed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over the packed rows of a batch, restricted to the pairs of rows that a plan allows.

    With ``s[i, j] = scale * q[i] . k[j]`` over the allowed pairs, ``out[i]`` is the sum over j of
    ``softmax_j(s[i, j]) * v[j]``. A fully masked row gives 0.

    Parameters
    ----------
    q : Tensor [T_q, H_q, D]
        Packed query rows of all sequences: float32, bfloat16 or float16 (the reference also float64). D is
        a multiple of 8 up to 256. The last dimension must be contiguous; the others may have any stride.
    k, v : Tensor [T_kv, H_kv, D]
        Keys and values, same dtype and device. H_q must be a multiple of H_kv: query head h reads key/value head
        ``h // (H_q // H_kv)``.
    plan : AttentionPlan
        From ``plan_attention``, on the same device.
    scale : float, optional
        Default ``1 / sqrt(D)``.
    softcap : float, optional
        Replaces s by ``softcap * tanh(s / softcap)`` before the mask.
    sinks : Tensor [H_q], float32, optional
        A logit per head that joins the denominator and the lse, never the output.
    return_lse : bool
        Whether to return the log-sum-exp as well.
    backend : str, optional
        Backends that may run this call, in order, such as ``"cpu"``; default the fastest that supports it.

    Returns
    -------
    out : Tensor [T_q, H_q, D]
        In the dtype of q; computed in float32 (float64 for float64).
    lse : Tensor [T_q, H_q], float32
        Natural log of the denominator, -inf for a fully masked row; only with ``return_lse``. Gradients flow
        through it.

    Raises
    ------
    TypeError, ValueError
        If dtypes, devices, shapes or strides don't match, or the plan was made for other row counts.

    Notes
    -----
    Differentiable in q, k, v and sinks; a second derivative raises. The cost is 4 * H_q * D FLOPs for each pair that
    ``plan.stats()`` counts as computed. The paper's decoder is plain causal (``ChunkMask.full()``); chunk masks are an
    extension.

    Examples
    --------
    >>> import torch
    >>> import refrag_kernels as rk
    >>> layout = rk.ChunkLayout.from_lengths([[5, 1, 1, 3], [4]])  # text, two slots, question; a text
    >>> plan = rk.plan_attention(layout)
    >>> q = torch.randn(14, 4, 16)
    >>> k, v = torch.randn(2, 14, 2, 16)
    >>> rk.mixed_attention(q, k, v, plan).shape
    torch.Size([14, 4, 16])
    """
    if not isinstance(plan, AttentionPlan):
        raise TypeError(f"plan: got {type(plan).__name__}, needs an AttentionPlan")
    tensors = plan.tensors()
    _check(q, k, v, sinks, plan.sizes.device, plan.q_row_block.shape[0], plan.kv_row_block.shape[0])
    if scale is not None or softcap is not None:
        check_score_options(scale, softcap)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    out, lse = _mixed_attention(q, k, v, tensors, scale, softcap or 0.0, sinks, backend=backend)
    return (out, lse) if return_lse else out


def attention_received(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Sum, for each key, the attention probabilities that it received: the column sums of the attention matrix.

    ``received[j, h]`` is the sum of ``exp(s[i, j] - lse[i])`` over all query rows i that attend to key j and over the
    query heads that read key/value head h, with the scores s of ``mixed_attention``. The probabilities are recomputed
    tile by tile, so the attention matrix is never stored.

    Parameters
    ----------
    q : Tensor [T_q, H_q, D]
        As passed to ``mixed_attention``: float32, bfloat16 or float16 (the reference also float64).
    k : Tensor [T_kv, H_kv, D]
        As passed to ``mixed_attention``. H_q must be a multiple of H_kv.
    lse : Tensor [T_q, H_q], float32
        As returned by ``mixed_attention``, contiguous (float64 if q is). It includes the sinks, if there were any. A
        row whose lse is -inf contributes nothing.
    plan : AttentionPlan
        As passed to ``mixed_attention``.
    scale, softcap : float, optional
        As passed to ``mixed_attention``.
    backend : str, optional
        Backends that may run this call, in order; default the fastest that supports it.

    Returns
    -------
    Tensor [T_kv, H_kv], float32
        float64 if q is. 0 for keys that no row attends to, and for rows beyond the batch under a capacity. Not
        differentiable.

    Raises
    ------
    TypeError, ValueError
        If dtypes, devices, shapes or strides don't match, or the plan was made for other row counts.

    Notes
    -----
    The sums don't depend on the number of threads or on the run. The cost is 2 * H_q * D FLOPs for each pair that
    ``plan.stats()`` counts as computed, half of that of ``mixed_attention``.

    Examples
    --------
    >>> import torch, refrag_kernels as rk
    >>> plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[3]]))
    >>> q, k, v = torch.zeros(3, 2, 8), torch.ones(3, 1, 8), torch.ones(3, 1, 8)
    >>> _, lse = rk.mixed_attention(q, k, v, plan, return_lse=True)
    >>> rk.attention_received(q, k, lse, plan)  # of two heads, each 1 + 1/2 + 1/3, 1/2 + 1/3 and 1/3
    tensor([[3.6667],
            [1.6667],
            [0.6667]])
    """
    if not isinstance(plan, AttentionPlan):
        raise TypeError(f"plan: got {type(plan).__name__}, needs an AttentionPlan")
    tensors = plan.tensors()
    _check_received(q, k, lse, plan.sizes.device, plan.q_row_block.shape[0], plan.kv_row_block.shape[0])
    check_score_options(scale, softcap)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    return _attention_received(q, k, lse, tensors, scale, softcap or 0.0, backend=backend)
