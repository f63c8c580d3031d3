"""mixed_attention in plain torch: its specification, forward and backward; and attention_received.

With s_ij = scale * q_i . k_j, or softcap * tanh(scale * q_i . k_j / softcap), over the pairs that the plan allows:

    lse_i = log(sum_j exp(s_ij) + exp(sink)),    p_ij = exp(s_ij - lse_i),    out_i = sum_j p_ij v_j

A fully masked row has out 0 and lse -inf (or the sink). The sums run over allowed pairs only: a NaN or inf in q, k or v
affects the rows that attend to it and the gradients of the keys that those attend to, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from refrag_kernels.plan_fields import PlanField
from refrag_kernels.reference.mask import pairs_of_plan


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _in_batch(tensor: torch.Tensor, row_block: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ``tensor`` in ``dtype``, with 0 in the rows beyond the batch, which may contain NaN."""
    return tensor.to(dtype).masked_fill(row_block[:, None, None] < 0, 0)


def _scores(
    q: torch.Tensor, k: torch.Tensor, allowed: torch.Tensor, scale: float, softcap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scores [G, T_q, T_kv] of a group of heads, -inf where not allowed, and d score / d product."""
    products = torch.einsum("igd,jd->gij", q, k) * scale
    if softcap > 0:
        ratio = torch.tanh(products / softcap)
        products, slope = softcap * ratio, scale * (1 - ratio * ratio)
    else:
        slope = torch.full((), scale, dtype=products.dtype, device=products.device)
    return products.masked_fill(~allowed, float("-inf")), slope


def _groups(q: torch.Tensor, k: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Yield each key/value head with the query heads that share it."""
    size = q.shape[1] // k.shape[1]
    for head in range(k.shape[1]):
        yield head, slice(head * size, (head + 1) * size)


def _probabilities(scores: torch.Tensor, lse: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Return exp(scores - lse), 0 where not allowed; lse [T_q, G]."""
    finite = lse.masked_fill(lse.isneginf(), 0).T[:, :, None]
    return torch.exp(scores - finite).masked_fill(~allowed, 0)


def _over_allowed(weights: torch.Tensor, allowed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return sum_j weights[g, i, j] * rows[j] over the allowed pairs (i, j); rows [T_kv, D], or a set for each g.

    The weight of a pair that is not allowed is 0, but 0 * NaN is NaN. So non-finite elements are left out of the matrix
    product, and the sums that include one are set to NaN.
    """
    finite = rows.isfinite()
    reached = torch.matmul(allowed.to(rows.dtype), (~finite).to(rows.dtype)) > 0
    return torch.matmul(weights, rows.masked_fill(~finite, 0)).masked_fill(reached, float("nan"))


def mixed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Sequence[torch.Tensor],
    scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``refrag_kernels.mixed_attention``; returns (out, lse)."""
    dtype, result_dtype = _compute_dtype(q), q.dtype
    allowed = pairs_of_plan(plan)
    q, k, v = (
        _in_batch(t, rows, dtype)
        for t, rows in (
            (q, plan[PlanField.Q_ROW_BLOCK]),
            (k, plan[PlanField.KV_ROW_BLOCK]),
            (v, plan[PlanField.KV_ROW_BLOCK]),
        )
    )
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=dtype, device=q.device)
    for head, group in _groups(q, k):
        scores, _ = _scores(q[:, group], k[:, head], allowed, scale, softcap)
        group_lse = torch.logsumexp(scores, -1).T if k.shape[0] else lse[:, group].fill_(float("-inf"))
        if sinks is not None:
            group_lse = torch.logaddexp(group_lse, sinks[group].to(dtype))
        lse[:, group] = group_lse
        p = _probabilities(scores, group_lse, allowed)
        out[:, group] = _over_allowed(p, allowed, v[:, head]).transpose(0, 1)
    return out.to(result_dtype), lse


def mixed_attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: Sequence[torch.Tensor],
    scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k, v and the sinks.

    With delta_i = dout_i . out_i - dlse_i and ds_ij = p_ij * (dout_i . v_j - delta_i), times the slope of the scores:
    dq_i = sum_j ds_ij k_j, dk_j = sum_i ds_ij q_i, dv_j = sum_i p_ij dout_i, dsink = -sum_i exp(sink - lse_i) delta_i.
    """
    dtype, result_dtype = _compute_dtype(q), q.dtype
    allowed = pairs_of_plan(plan)
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1) - grad_lse.to(dtype)
    q_row_block, kv_row_block = plan[PlanField.Q_ROW_BLOCK], plan[PlanField.KV_ROW_BLOCK]
    delta = delta.masked_fill(q_row_block[:, None] < 0, 0)
    q, grad_out = (_in_batch(t, q_row_block, dtype) for t in (q, grad_out))
    k, v = (_in_batch(t, kv_row_block, dtype) for t in (k, v))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for head, group in _groups(q, k):
        scores, slope = _scores(q[:, group], k[:, head], allowed, scale, softcap)
        p = _probabilities(scores, lse[:, group].to(dtype), allowed)
        dp = torch.einsum("igd,jd->gij", grad_out[:, group], v[:, head])
        ds = (p * (dp - delta[:, group].T[:, :, None]) * slope).masked_fill(~allowed, 0)
        dq[:, group] = _over_allowed(ds, allowed, k[:, head]).transpose(0, 1)
        dk[:, head] = _over_allowed(ds.mT, allowed.T, q[:, group].transpose(0, 1)).sum(0)
        dv[:, head] = _over_allowed(p.mT, allowed.T, grad_out[:, group].transpose(0, 1)).sum(0)
    dq, dk, dv = (grad.to(result_dtype) for grad in (dq, dk, dv))
    if sinks is None:
        return dq, dk, dv, torch.empty(0, dtype=torch.float32, device=q.device)
    weight = torch.exp(sinks.to(dtype) - lse.to(dtype))
    return dq, dk, dv, -(weight * delta).sum(0).to(sinks.dtype)


def attention_received(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    plan: Sequence[torch.Tensor],
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """See ``refrag_kernels.attention_received``: received_j = sum_i p_ij over the rows and heads of a group."""
    dtype = _compute_dtype(q)
    allowed = pairs_of_plan(plan)
    q = _in_batch(q, plan[PlanField.Q_ROW_BLOCK], dtype)
    k = _in_batch(k, plan[PlanField.KV_ROW_BLOCK], dtype)
    received = torch.empty(k.shape[:2], dtype=dtype, device=k.device)
    for head, group in _groups(q, k):
        scores, _ = _scores(q[:, group], k[:, head], allowed, scale, softcap)
        group_lse = lse[:, group].to(dtype)
        empty = group_lse.isneginf().T[:, :, None]
        received[:, head] = _probabilities(scores, group_lse, allowed).masked_fill(empty, 0).sum((0, 1))
    return received
