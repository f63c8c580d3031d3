"""Attention with a softcap or sinks but without a plan, for decode steps and padded batches.

torch's scaled_dot_product_attention supports neither, and transformers' wrapper of it drops sinks.
"""

from __future__ import annotations

import torch

import refrag_kernels as rk
from refrag_kernels import VisibleRanges


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    causal: bool = True,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Compute attention under a dense mask.

    A decode step runs ``paged_attention``, which reads keys and values once; other calls materialize the scores.

    Parameters
    ----------
    query : Tensor [B, H_q, Q, D]
    key, value : Tensor [B, H_kv, S, D]
    mask : Tensor [B or 1, 1, Q, S], optional
        Boolean, True where a row attends to a key, or a bias to add to the scores.
    scale : float, optional
        Defaults to ``1 / sqrt(D)``.
    softcap : float, optional
        Scores become ``softcap * tanh(scale * q . k / softcap)``.
    sinks : Tensor [H_q], optional
        Logits that are added to each head's softmax denominator.
    causal : bool
        Applies to several query rows without a mask. True: each row attends to the first Q keys up to its own position;
        False: to all keys.
    dropout : float
        Dropout probability of the attention weights.

    Returns
    -------
    Tensor [B, Q, H_q, D]
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if _is_step(query, key, value, mask) and not dropout:
        return _step(query, key, value, mask, scale, softcap, sinks)
    batch, heads, rows, _ = query.shape
    if mask is None and causal and rows > 1:  # a static cache also returns its unused rows
        key, value = key[:, :, :rows], value[:, :, :rows]
        mask = torch.ones(rows, rows, dtype=torch.bool, device=query.device).tril()[None, None]
    # Fold query heads that share a KV head into rows, so that keys needn't be repeated.
    folded = query.reshape(batch, key.shape[1], -1, query.shape[-1])
    scores = (folded @ key.transpose(2, 3)).view(batch, heads, rows, -1) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        hidden = torch.finfo(scores.dtype).min  # not -inf: padding rows are fully masked and would turn into NaN
        scores = scores.masked_fill(~mask, hidden) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[None, :, None, None].expand(batch, -1, rows, 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)[
        ..., : key.shape[2]
    ]
    weights = torch.nn.functional.dropout(weights, dropout)
    out = weights.reshape(batch, key.shape[1], -1, key.shape[2]) @ value
    return out.view(batch, heads, rows, -1).transpose(1, 2)


def _is_step(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Return whether this is a decode step that paged_attention supports."""
    needs_grad = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
    return (
        query.shape[2] == 1
        and key.shape == value.shape
        and query.shape[3] % 8 == 0
        and query.shape[3] <= 256
        and query.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and (mask is None or mask.dtype == torch.bool)
        and not needs_grad
        and not torch.compiler.is_compiling()
    )


def _step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    batch, rows = key.shape[0], key.shape[2]
    # transformers' cache acts as one page per sequence.
    key, value = (states if states.stride(-1) == 1 else states.contiguous() for states in (key, value))
    out = rk.paged_attention(
        query[:, :, 0],
        key.transpose(1, 2),
        value.transpose(1, 2),
        torch.arange(batch, dtype=torch.int32, device=key.device)[:, None],
        torch.full((batch,), rows, dtype=torch.int32, device=key.device),
        visible=None if mask is None else _ranges(mask, batch),
        scale=scale,
        softcap=softcap,
        sinks=None if sinks is None else sinks.float(),
    )
    return out[:, None]  # type: ignore[call-overload]  # a pair only with return_lse


def _ranges(mask: torch.Tensor, batch: int) -> VisibleRanges:
    """Return the key ranges that each sequence's row attends to, cached on the mask that all layers of a step share."""
    known = getattr(mask, "refrag_ranges", None)
    if isinstance(known, VisibleRanges):
        return known
    edges = torch.nn.functional.pad(mask[:, 0, 0].expand(batch, -1).to(torch.int8), (1, 1)).diff()
    starts, ends = (edges == 1).nonzero(), (edges == -1).nonzero()
    indptr = torch.nn.functional.pad((edges == 1).sum(1).cumsum(0), (1, 0)).to(torch.int32)
    ranges = VisibleRanges(indptr, torch.stack([starts[:, 1], ends[:, 1]], dim=1).to(torch.int32))
    mask.refrag_ranges = ranges  # type: ignore[attr-defined]
    return ranges
