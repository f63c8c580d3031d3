"""select_chunk_rows in plain torch: its specification, without synchronization with the device."""

from __future__ import annotations

import torch

from refrag_kernels.reference.pooling import chunk_of_row


def select_chunk_rows(
    k: torch.Tensor,
    v: torch.Tensor,
    chunk_offsets: torch.Tensor,
    kept_offsets: torch.Tensor,
    num_kept: int,
    scores: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``refrag_kernels.select_chunk_rows``."""
    num_rows, heads, _ = k.shape
    chunk = chunk_of_row(chunk_offsets, num_rows)
    if scores is None:
        scores = _unlike_mean(k, chunk, chunk_offsets, cos, sin)
    row = torch.arange(num_rows, device=k.device)[:, None].expand(-1, heads)
    # Rows beyond the last chunk are in a chunk of their own, of which nothing is kept.
    starts, kept = chunk_offsets.long(), torch.nn.functional.pad(kept_offsets.diff(), (0, 1))
    rank = torch.empty_like(row).scatter_(0, _best_first(scores, chunk), row - starts[chunk][:, None])
    keep = rank < kept[chunk][:, None]
    place = torch.where(keep, keep.cumsum(0) - 1, num_kept)  # the others go to an extra row that is cut off
    rows = torch.full((num_kept + 1, heads), -1, dtype=torch.int64, device=k.device).scatter_(0, place, row)[:-1]
    return _gather(k, rows), _gather(v, rows), rows.int()


def _unlike_mean(
    k: torch.Tensor,
    chunk: torch.Tensor,
    chunk_offsets: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
) -> torch.Tensor:
    """Return minus the cosine between each key and the mean of its chunk's keys [T, H]; 0 where one of them is 0."""
    keys = k.to(torch.float64 if k.dtype == torch.float64 else torch.float32)
    if cos is not None and sin is not None:
        half = cos.shape[1]
        first, second, rest = keys.split([half, half, keys.shape[2] - 2 * half], 2)
        cos, sin = cos[:, None], sin[:, None]
        keys = torch.cat([first * cos + second * sin, second * cos - first * sin, rest], 2)
    sums = keys.new_zeros(len(chunk_offsets), *keys.shape[1:]).index_add_(0, chunk, keys)
    mean = sums / torch.nn.functional.pad(chunk_offsets.diff(), (0, 1), value=1)[:, None, None]
    norms = keys.norm(dim=2) * mean.norm(dim=2)[chunk]
    return -torch.where(norms == 0, 0, (keys * mean[chunk]).sum(2) / norms)


def _best_first(scores: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
    """Return the rows [T, H] of each chunk after another, the best first: NaN last, the first of equal ones first."""
    is_nan = scores.isnan()
    order = scores.masked_fill(is_nan, 0).argsort(dim=0, descending=True, stable=True)
    for key in (is_nan, chunk[:, None].expand_as(is_nan)):
        order = order.gather(0, key.gather(0, order).int().argsort(dim=0, stable=True))
    return order


def _gather(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return rows [n, H] of a tensor [T, H, D], 0 for row -1."""
    if not tensor.shape[0]:
        return tensor.new_zeros(*rows.shape, tensor.shape[2])
    index = rows.clamp(min=0)[..., None].expand(-1, -1, tensor.shape[2])
    return tensor.gather(0, index).masked_fill(rows[..., None] < 0, 0)
