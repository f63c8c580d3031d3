"""The specification of paged_attention, append_kv and merge_states: plain torch in float64, without synchronization."""

from __future__ import annotations

import torch

# Gathered keys and values of one block of query rows stay below this many elements (each 8 bytes).
_GATHER_LIMIT = 1 << 24


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lengths: torch.Tensor,
    q_offsets: torch.Tensor | None,
    visible_indptr: torch.Tensor | None,
    visible_ranges: torch.Tensor | None,
    scale: float,
    softcap: float,
    window_left: int,
    window_right: int,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather, for each query row, all keys that its page table could hold; mask, softmax, sum."""
    num_rows, heads, dim = q.shape
    num_pages, page, kv_heads, _ = k_pages.shape
    num_keys = page_table.shape[1] * page if num_pages else 0
    out = q.new_zeros(q.shape, dtype=torch.float64)
    lse = q.new_full((num_rows, heads), -torch.inf, dtype=torch.float64)
    if num_keys and num_rows:
        sequence, position = _rows(num_rows, kv_lengths, q_offsets)
        block = max(1, _GATHER_LIMIT // (num_keys * kv_heads * dim))
        for rows in torch.arange(num_rows, device=q.device).split(block):
            visible = _visible(
                rows, sequence, position, num_keys, kv_lengths, visible_indptr, visible_ranges, window_left
            )
            out[rows], lse[rows] = _attend(
                q[rows], k_pages, v_pages, page_table[sequence[rows]], visible, scale, softcap
            )
    if sinks is not None:
        merged = torch.logaddexp(lse, sinks.double())
        # An empty row's weight is exp(-inf - sink) = 0, but both may be -inf.
        out *= torch.where(lse == -torch.inf, 0.0, torch.exp(lse - merged))[..., None]
        lse = merged
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out.to(q.dtype), lse.to(lse_dtype)


def _rows(num_rows: int, kv_lengths: torch.Tensor, q_offsets: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each packed row's sequence and its position in it."""
    row = torch.arange(num_rows, device=kv_lengths.device)
    if q_offsets is None:
        return row, kv_lengths.long() - 1
    sequence = torch.searchsorted(q_offsets[1:], row.int(), right=True)
    return sequence, kv_lengths.long()[sequence] - q_offsets.long()[sequence + 1] + row


def _visible(rows, sequence, position, num_keys, kv_lengths, indptr, ranges, window_left) -> torch.Tensor:
    """Return which of the keys each row attends to, bool [rows, num_keys]."""
    key = torch.arange(num_keys, device=rows.device)
    i = position[rows, None]
    # A row's position is below its sequence's length, except in an empty sequence.
    visible = (key <= i) & (key < kv_lengths[sequence[rows], None])
    if window_left >= 0:
        visible &= key >= i - window_left
    if indptr is not None:
        # +1 where a range starts and -1 where it ends; the running sum is 1 inside.
        edges = torch.zeros(len(rows), num_keys + 1, dtype=torch.int32, device=rows.device)
        index = torch.arange(len(ranges), device=rows.device, dtype=torch.int32)
        owner = torch.searchsorted(indptr[1:].contiguous(), index, right=True) - rows[0]
        mine = ((owner >= 0) & (owner < len(rows))).int()
        owner = owner.clamp(0, len(rows) - 1)
        for edge, sign in ((ranges[:, 0], mine), (ranges[:, 1], -mine)):
            edges.index_put_((owner, edge.long().clamp(0, num_keys)), sign, accumulate=True)
        visible &= edges.cumsum(1)[:, :-1] > 0
    return visible


def _attend(q, k_pages, v_pages, page_table, visible, scale, softcap) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from each row of ``q`` to the keys of its row of ``page_table`` that are visible to it."""
    page, kv_heads = k_pages.shape[1], k_pages.shape[2]
    rows, heads, dim = q.shape
    # Pages that no row attends to may contain anything, so neither their ids nor their values are used.
    needed = visible.unflatten(1, (-1, page)).any(2)
    pages = torch.where(needed, page_table, 0).long()
    k, v = (
        torch.where(visible[:, :, None, None], cache[pages].flatten(1, 2).double(), 0.0) for cache in (k_pages, v_pages)
    )  # [rows, keys, H_kv, D]
    grouped = q.double().reshape(rows, kv_heads, heads // kv_heads, dim)
    scores = torch.einsum("rhgd,rkhd->rhgk", grouped, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, None, None, :], -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    out = torch.einsum("rhgk,rkhd->rhgd", weights, v)
    return out.reshape(rows, heads, dim), lse.reshape(rows, heads)


def append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lengths: torch.Tensor,
    q_offsets: torch.Tensor,
) -> None:
    """Write each new row at its position's page and slot."""
    if not len(k):
        return
    sequence, position = _rows(len(k), kv_lengths, q_offsets)
    page = k_pages.shape[1]
    index = (page_table[sequence, position // page].long(), position % page)
    k_pages.index_put_(index, k)
    v_pages.index_put_(index, v)


def _weights(lse_a: torch.Tensor, lse_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the merged lse and the weight of each state, in float64."""
    lse_a, lse_b = lse_a.double(), lse_b.double()
    lse = torch.logaddexp(lse_a, lse_b)
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    return lse, torch.exp(lse_a - finite), torch.exp(lse_b - finite)


def _values(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Return ``out`` in float64, 0 where its state is empty."""
    return out.double().masked_fill((lse == -torch.inf)[..., None], 0.0)


def merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weigh each output with its share of the joint denominator."""
    lse, weight_a, weight_b = _weights(lse_a, lse_b)
    out = weight_a[..., None] * _values(out_a, lse_a) + weight_b[..., None] * _values(out_b, lse_b)
    return out.to(out_a.dtype), lse.to(lse_a.dtype)


def merge_states_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """With weights a + b = 1: d out / d lse_a = a b (out_a - out_b), d lse / d lse_a = a, and likewise for b."""
    _, weight_a, weight_b = _weights(lse_a, lse_b)
    grad_out, grad_lse = grad_out.double(), grad_lse.double()
    shift = weight_a * weight_b * (grad_out * (_values(out_a, lse_a) - _values(out_b, lse_b))).sum(-1)
    return (
        (weight_a[..., None] * grad_out).to(out_a.dtype),
        (weight_a * grad_lse + shift).to(lse_a.dtype),
        (weight_b[..., None] * grad_out).to(out_b.dtype),
        (weight_b * grad_lse - shift).to(lse_b.dtype),
    )
