"""Checks of the values in a paged cache's tables, on CPU tensors, with errors that name the argument.

The reference runs them before each call. The C++ backend tests the same rules itself (see csrc/cpu/paged.cpp), in a
microsecond, and comes here for the error once it has found a fault.
"""

from __future__ import annotations

import torch


def check_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lengths: torch.Tensor,
    q_offsets: torch.Tensor | None,
    visible_indptr: torch.Tensor | None,
    visible_ranges: torch.Tensor | None,
) -> None:
    """Raise ValueError unless the tables of a ``paged_attention`` call hold together."""
    _check_lengths(k_pages, page_table, kv_lengths)
    if q_offsets is not None:
        # With no keys at all the rows see nothing; else each row is one of the keys' rows.
        _check_offsets(q.shape[0], kv_lengths, q_offsets, kv_lengths > 0)
    _check_pages(k_pages, page_table, torch.zeros_like(kv_lengths), kv_lengths)
    if visible_indptr is not None and visible_ranges is not None:
        _check_ranges(visible_indptr, visible_ranges)


def check_append(
    k: torch.Tensor,
    k_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lengths: torch.Tensor,
    q_offsets: torch.Tensor,
) -> None:
    """Raise ValueError unless the tables of an ``append_kv`` call hold together."""
    _check_lengths(k_pages, page_table, kv_lengths)
    _check_offsets(k.shape[0], kv_lengths, q_offsets, torch.ones_like(kv_lengths, dtype=torch.bool))
    _check_pages(k_pages, page_table, kv_lengths - q_offsets.diff(), kv_lengths)


def _first(bad: torch.Tensor) -> tuple[int, ...] | None:
    """Return the index of the first True."""
    found = bad.nonzero()
    return tuple(found[0].tolist()) if len(found) else None


def _check_lengths(k_pages: torch.Tensor, page_table: torch.Tensor, kv_lengths: torch.Tensor) -> None:
    most = page_table.shape[1] * k_pages.shape[1]
    at = _first((kv_lengths < 0) | (kv_lengths > most))
    if at is not None:
        raise ValueError(
            f"kv_lengths: got {kv_lengths[at].item()} for sequence {at[0]}, needs 0 to {most}"
            f" (page_table has {page_table.shape[1]} pages of {k_pages.shape[1]} rows)"
        )


def _check_offsets(rows: int, kv_lengths: torch.Tensor, q_offsets: torch.Tensor, bounded: torch.Tensor) -> None:
    if q_offsets[0] != 0:
        raise ValueError(f"q_offsets: got {q_offsets[0].item()} at its start, needs 0")
    counts = q_offsets.long().diff()
    at = _first(counts < 0)
    if at is not None:
        raise ValueError(
            f"q_offsets: got {q_offsets[at].item()} before {q_offsets[at[0] + 1].item()} at sequence {at[0]}, "
            "needs ascending values"
        )
    if q_offsets[-1] != rows:
        raise ValueError(f"q_offsets: got {q_offsets[-1].item()} at its end, needs {rows}, the number of rows")
    at = _first(bounded & (counts > kv_lengths))
    if at is not None:
        raise ValueError(
            f"kv_lengths: got {kv_lengths[at].item()} for sequence {at[0]}, needs at least {counts[at].item()}, "
            "its number of rows by q_offsets"
        )


def _check_pages(k_pages: torch.Tensor, page_table: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> None:
    """Check the entries of ``page_table`` that hold rows [start, end) of each sequence."""
    num_pages, page = k_pages.shape[:2]
    slot = torch.arange(page_table.shape[1], dtype=torch.int32, device="cpu")
    used = (slot >= start[:, None] // page) & (slot * page < end[:, None])
    at = _first(used & ((page_table < 0) | (page_table >= num_pages)))
    if at is not None:
        raise ValueError(
            f"page_table: got page {page_table[at].item()} at {list(at)}, needs 0 to {num_pages - 1}"
            f" (k_pages has {num_pages} pages)"
        )


def _check_ranges(indptr: torch.Tensor, ranges: torch.Tensor) -> None:
    if indptr[0] != 0:
        raise ValueError(f"visible.indptr: got {indptr[0].item()} at its start, needs 0")
    at = _first(indptr.diff() < 0)
    if at is not None:
        raise ValueError(
            f"visible.indptr: got {indptr[at].item()} before {indptr[at[0] + 1].item()} at row {at[0]}, "
            "needs ascending values"
        )
    used = int(indptr[-1])
    if used > len(ranges):
        raise ValueError(f"visible.indptr: got {used} at its end, needs at most {len(ranges)}, the number of ranges")
    ranges = ranges[:used]
    at = _first((ranges[:, 0] < 0) | (ranges[:, 0] > ranges[:, 1]))
    if at is not None:
        raise ValueError(f"visible.ranges: got {ranges[at].tolist()} at {at[0]}, needs 0 <= start <= end")
    # The first range of a row has no neighbour before it.
    first = torch.zeros(used + 1, dtype=torch.bool, device="cpu")
    first[indptr.long()] = True
    at = _first((ranges[1:, 0] < ranges[:-1, 1]) & ~first[1:used])
    if at is not None:
        raise ValueError(
            f"visible.ranges: got {ranges[at[0] + 1].tolist()} after {ranges[at].tolist()} at {at[0] + 1}, "
            "needs ranges of a row sorted and disjoint"
        )
