"""visible_ranges: the keys that a query row may attend to, as ranges."""

from __future__ import annotations

from typing import NamedTuple

import torch

from refrag_kernels import extension
from refrag_kernels.layout import ChunkLayout
from refrag_kernels.mask import ChunkMask
from refrag_kernels.plan import _problem
from refrag_kernels.validation import check_dtype, check_shape


class VisibleRanges(NamedTuple):
    """The key rows that some query rows may attend to, by the chunk mask alone.

    Attributes
    ----------
    indptr : Tensor, int32 [T_q + 1]
        Where each query row's list starts in ``ranges``.
    ranges : Tensor, int32 [R, 2]
        Rows [start, end), counted from the first row of the query's sequence; sorted and disjoint.
    """

    indptr: torch.Tensor
    ranges: torch.Tensor


def visible_ranges(
    layout: ChunkLayout, mask: ChunkMask, rows: torch.Tensor, out: VisibleRanges | None = None
) -> VisibleRanges:
    """Return the key rows that some rows of a layout may attend to under a chunk mask, as ranges.

    ``paged_attention`` takes the result as ``visible``, and applies causality and windows itself.

    Parameters
    ----------
    layout : ChunkLayout
        Chunks of the rows in the cache.
    mask : ChunkMask
        Which chunk may attend to which chunk.
    rows : integer tensor [T_q]
        Packed rows of ``layout``: the query rows, in the order in which they are passed to ``paged_attention``.
    out : VisibleRanges, optional
        Fixed-size tensors to fill: ``indptr`` as long as ``rows`` plus 1, ``ranges`` with room for at least as many as
        are needed; one asynchronous copy each.

    Returns
    -------
    VisibleRanges
        On the layout's device, or ``out``.

    Raises
    ------
    IndexError
        If a row is outside the layout.
    ValueError
        If the mask does not match the layout or ``out`` is too small.

    Examples
    --------
    >>> import torch
    >>> from refrag_kernels import ChunkLayout, ChunkMask, visible_ranges
    >>> layout = ChunkLayout.from_lengths([[2, 3, 3, 2]])
    >>> visible = visible_ranges(layout, ChunkMask.passages([-1, 0, 1, -1]), torch.tensor([4, 6]))
    >>> visible.indptr.tolist(), visible.ranges.tolist()
    ([0, 2, 4], [[0, 5], [8, 10], [0, 2], [5, 10]])
    """
    if not isinstance(layout, ChunkLayout):
        raise TypeError(f"layout: got {type(layout).__name__}, needs a ChunkLayout")
    host = layout.host()
    if not isinstance(rows, torch.Tensor):
        raise TypeError(f"rows: got {type(rows).__name__}, needs a torch.Tensor")
    if rows.dim() != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
        raise ValueError(f"rows: got shape {list(rows.shape)} of {rows.dtype}, needs one dimension of integers")
    rows = rows.to("cpu", torch.int64)
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < host.total_rows:
        bad = rows[(rows < 0) | (rows >= host.total_rows)][0]
        raise IndexError(f"rows: got {int(bad)}, needs a row in [0, {host.total_rows})")
    rows = rows.to(torch.int32).contiguous()
    built = extension.planner().visible(*_problem(host, mask), rows.data_ptr(), rows.shape[0])
    count = built.num_ranges()
    pinned = layout.device.type == "cuda" and torch.cuda.is_available()
    indptr = torch.empty(rows.shape[0] + 1, dtype=torch.int32, device="cpu", pin_memory=pinned)
    ranges = torch.empty(count, 2, dtype=torch.int32, device="cpu", pin_memory=pinned)
    built.write(indptr.data_ptr(), ranges.data_ptr())
    if out is None:
        return VisibleRanges(indptr.to(layout.device, non_blocking=True), ranges.to(layout.device, non_blocking=True))
    check_dtype("out.indptr", out.indptr, torch.int32)
    check_shape("out.indptr", out.indptr, *indptr.shape)
    check_dtype("out.ranges", out.ranges, torch.int32)
    check_shape("out.ranges", out.ranges, "R", 2)
    if out.ranges.shape[0] < count:
        raise ValueError(f"out.ranges: got room for {out.ranges.shape[0]} ranges, needs {count}")
    out.indptr.copy_(indptr, non_blocking=True)
    out.ranges[:count].copy_(ranges, non_blocking=True)
    return out
