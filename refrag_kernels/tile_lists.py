"""Tile lists: what GPU kernels iterate over, derived from a plan when it is made for a GPU or moved to one.

A GPU's tiles have 64 rows or more, so several blocks of 16 rows share one. A list groups ``group`` consecutive blocks
of one side of the plan, and holds the rows of the other side that the group attends to, or that attend to it:

work_items [work items + 1, 5]
    What each program of a kernel does: its first range, its first partial tile, the steps of 64 rows in the ranges of
    all work items before it, its group, and its partial. A work item is a group (partial -1), or a part of a group with
    much more work than the others, such as the keys of a prefix that all rows attend to. The sums of a part are stored
    as a split-KV partial and added up afterwards.
ranges [R, 2]
    Rows [start, end) of the other side that every row of the group attends to, or that all attend to the group.
    Multiples of 64 rows long, so that a kernel takes steps of up to 64 rows without a bounds check.
partial_tiles [E, 2 + group]
    First row and number of rows (1 to 16) of a tile of the other side, and a code for each block of the group: -1
    skipped, -2 full, else an index into ``partial_bits``. A kernel takes several partial tiles in a step; they need not
    be adjacent.
partials [S], of keys only
    The group of each partial, ascending; -1 where unused. Lists without partials have fewer than 3 rows here, as has
    every list under a capacity.

Groups may hold blocks of two sequences. Under a capacity the lists are longer than what ``work_items`` refers to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch

from refrag_kernels import extension

T = TypeVar("T")


class TileList(NamedTuple):
    """One list: the blocks that it groups."""

    keys: bool  # whether it groups blocks of keys, and lists query rows
    group: int  # blocks per group

    def row_shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of a row of work items, ranges, partial tiles and partials."""
        return [(5,), (2,), (2 + self.group,), *([()] if self.keys else [])]


# Query rows for grouped-query attention, whose heads fill a tile by themselves; query rows for one or two heads per
# key/value head; keys, for their gradients.
TILE_LISTS = (TileList(False, 1), TileList(False, 4), TileList(True, 4))

ROW_SHAPES = [shape for tile_list in TILE_LISTS for shape in tile_list.row_shapes()]


def tensors_of(values: Sequence[T], which: TileList) -> Sequence[T]:
    """Return the work items, ranges, partial tiles and partials of a list, out of the values for all lists."""
    first = sum(len(other.row_shapes()) for other in TILE_LISTS[: TILE_LISTS.index(which)])
    return values[first : first + len(which.row_shapes())]


def wanted(device: torch.device) -> bool:
    """Return whether plans for ``device`` have tile lists: CPU backends iterate over the plan itself."""
    return device.type == "cuda"


def derive(plan: Sequence[torch.Tensor], *, split: bool) -> list:
    """Return the planner's lists for the fields of a plan, which must be on the CPU.

    ``split``: whether groups of keys with much work may become several work items.
    """
    addresses = [tensor.data_ptr() for tensor in plan]
    make = extension.planner().tile_lists
    return [make(addresses, *tile_list, split and tile_list.keys) for tile_list in TILE_LISTS]


def sizes(lists: list) -> list[int]:
    """Return the rows of each tensor of ``lists``; never 0 or 1, on which torch.compile would specialize."""
    return [
        # A list without partials has two rows of them; a group in two parts has two partials and gets a third row.
        max(3 if kind == 3 and rows else 2, rows)
        for tile_list, built in zip(TILE_LISTS, lists)
        for kind, rows in enumerate(built.rows()[: len(tile_list.row_shapes())])
    ]


def capacity(q_blocks: int, kv_blocks: int, full: int, partial: int, full_t: int) -> list[int]:
    """Return the rows that the lists of a plan of these capacities have; none of their groups is split.

    A range of a group starts where one of its blocks' ranges does, so there are no more. A block by itself has its
    partial tiles and at most 3 tiles left over from each range. A group may need more of them where its blocks attend
    to different rows; the factor of 4 lets each block keep its own.
    """
    rows = []
    for tile_list in TILE_LISTS:
        blocks, ranges = (kv_blocks, full_t) if tile_list.keys else (q_blocks, full)
        partial_tiles = partial + 3 * ranges if tile_list.group == 1 else 4 * (partial + ranges)
        rows += [-(-blocks // tile_list.group) + 1, ranges, partial_tiles, *([0] if tile_list.keys else [])]
    return [max(2, count) for count in rows]


def write(lists: list, buffer: int, offsets: Sequence[int], rows: Sequence[int]) -> None:
    """Write ``lists`` to a buffer at this address, at word ``offsets``; see ``capacity`` for what fits."""
    for number, (tile_list, built) in enumerate(zip(TILE_LISTS, lists)):
        room, at = tensors_of(rows, tile_list), tensors_of(offsets, tile_list)
        needed = built.rows()
        if any(need > have for need, have in zip(needed, room)):
            raise ValueError(
                f"capacity: got room for {room[2]} partial tiles of tile list {number}, needs {needed[2]} for this "
                "batch; needs larger partial_tiles"
            )
        built.write(buffer, at, room)
