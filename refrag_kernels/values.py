"""Checks of the values of index tensors on the CPU, with errors that name the argument.

There is one function for each op that reads indices from tensors; see ``registration`` for when they run.
"""

from __future__ import annotations

import torch


def check_paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lengths: torch.Tensor,
    q_offsets: torch.Tensor | None,
    visible_indptr: torch.Tensor | None,
    visible_ranges: torch.Tensor | None,
    *_: object,
) -> None:
    """Raise ValueError unless the tables of a ``paged_attention`` call agree with each other."""
    _check_lengths(k_pages, page_table, kv_lengths)
    if q_offsets is not None:
        # Without keys the rows are fully masked; otherwise each row is one of the keys' rows.
        _check_offsets(q.shape[0], kv_lengths, q_offsets, kv_lengths > 0)
    _check_pages(k_pages, page_table, torch.zeros_like(kv_lengths), kv_lengths)
    if visible_indptr is not None and visible_ranges is not None:
        _check_ranges(visible_indptr, visible_ranges)


def check_append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lengths: torch.Tensor,
    q_offsets: torch.Tensor,
) -> None:
    """Raise ValueError unless the tables of an ``append_kv`` call agree with each other."""
    _check_lengths(k_pages, page_table, kv_lengths)
    _check_offsets(k.shape[0], kv_lengths, q_offsets, torch.ones_like(kv_lengths, dtype=torch.bool))
    _check_pages(k_pages, page_table, kv_lengths - q_offsets.diff(), kv_lengths)


def check_pool_chunks(hidden: torch.Tensor, chunk_offsets: torch.Tensor, *_: object) -> None:
    """Raise ValueError unless ``chunk_offsets`` start at 0, ascend and end within the rows of ``hidden``."""
    _check_chunks("hidden", hidden, chunk_offsets)


def check_select_chunk_rows(
    k: torch.Tensor,
    v: torch.Tensor,
    chunk_offsets: torch.Tensor,
    kept_offsets: torch.Tensor,
    num_kept: int,
    *_: object,
) -> None:
    """Raise ValueError unless chunks are in order and not empty, and there are as many rows as are to be kept."""
    _check_chunks("k", k, chunk_offsets)
    if int(kept_offsets[0]) != 0 or int(kept_offsets[-1]) > num_kept:
        raise ValueError(
            f"kept_offsets: got first {int(kept_offsets[0])} and last {int(kept_offsets[-1])}, "
            f"needs 0 and at most num_kept, {num_kept}"
        )
    counts, lengths = kept_offsets.diff(), chunk_offsets.diff()
    at = _first((counts < 0) | (counts > lengths))
    if at is not None:
        raise ValueError(
            f"kept_offsets: got {int(counts[at])} rows for chunk {at[0]}, needs 0 to {int(lengths[at])}, its length"
        )


def check_embed_mixed(
    token_ids: torch.Tensor, token_table: torch.Tensor, chunks: torch.Tensor, slot_of_row: torch.Tensor, *_: object
) -> None:
    """Raise IndexError unless slots are rows of ``chunks`` or -1, and the ids of text rows are in the table."""
    if not token_ids.numel():
        return
    count, vocabulary = chunks.shape[0], token_table.shape[0]
    bad = (slot_of_row < -1) | (slot_of_row >= count)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise IndexError(f"slot_of_row: got {int(slot_of_row[row])} in row {row}, needs -1 or a chunk in [0, {count})")
    bad = (slot_of_row < 0) & ((token_ids < 0) | (token_ids >= vocabulary))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise IndexError(f"token_ids: got {int(token_ids[row])} in row {row}, needs a token in [0, {vocabulary})")


def check_chunk_offsets(chunk_offsets: torch.Tensor) -> None:
    """Raise ValueError unless chunks start at row 0, follow each other and have at least one row."""
    if int(chunk_offsets[0]) != 0:
        raise ValueError(f"chunk_offsets: got first {int(chunk_offsets[0])}, needs 0")
    lengths = chunk_offsets.diff()
    at = _first(lengths < 1)
    if at is not None:
        raise ValueError(f"chunk_offsets: got a length of {int(lengths[at])} for chunk {at[0]}, needs at least 1")


def _check_chunks(name: str, tensor: torch.Tensor, chunk_offsets: torch.Tensor) -> None:
    """Raise ValueError unless the offsets are valid and end within the rows of ``tensor``."""
    if int(chunk_offsets[0]) != 0 or int(chunk_offsets[-1]) > tensor.shape[0]:
        raise ValueError(
            f"chunk_offsets: got first {int(chunk_offsets[0])} and last {int(chunk_offsets[-1])}, "
            f"needs 0 and at most the {tensor.shape[0]} rows of {name}"
        )
    check_chunk_offsets(chunk_offsets)


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
