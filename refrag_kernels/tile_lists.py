"""Tile lists: what GPU kernels walk, derived from a plan when it is made for a GPU or moved to one.

A GPU's tiles have 64 rows and more: several blocks of 16 rows share one. A list groups ``group`` consecutive blocks of
one side of the plan and says which rows of the other side the group has to do with:

units [units + 1, 5]
    What each program of a kernel does: its first range, its first entry, the steps of 64 rows in the ranges of all
    units before it, its group, and its slot. A unit is a group (slot -1), or a part of one that has much more work
    than the others, as the keys of a prefix have that all rows see; the sums of a part go to its slot, to be added up.
ranges [R, 2]
    Rows [start, end) of the other side that every row of the group sees, or is seen by. Multiples of 64 rows long, so
    that a kernel takes steps of up to 64 rows without a test.
entries [E, 2 + group]
    First row and number of rows (1 to 16) of a tile of the other side, and a code for each block of the group: -1
    skipped, -2 full, else an index into ``partial_bits``. A kernel takes several entries in a step, wherever they lie.
slots [S], of keys only
    The group of each slot, ascending; -1 for slots of none. There are none in fewer than 3, and under a capacity.

Groups may hold blocks of two sequences. Under a capacity the lists are longer than what ``units`` refers to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch

from refrag_kernels import extension

T = TypeVar("T")


class TileList(NamedTuple):
    """One list: how it is made, and the fields of the plan that bound its size."""

    keys: bool  # whether it groups blocks of keys, and lists query rows
    group: int  # blocks per group

    def row_shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of a row of units, ranges, entries and slots."""
        return [(5,), (2,), (2 + self.group,), *([()] if self.keys else [])]


# Query rows for grouped-query attention, whose heads fill a tile by themselves; query rows for one or two heads per
# key/value head; keys, for their gradients.
TILE_LISTS = (TileList(False, 1), TileList(False, 4), TileList(True, 4))

ROW_SHAPES = [shape for tile_list in TILE_LISTS for shape in tile_list.row_shapes()]


def tensors_of(values: Sequence[T], which: TileList) -> Sequence[T]:
    """Return what belongs to units, ranges, entries and slots of a list, of the values for the tensors of all lists."""
    first = sum(len(other.row_shapes()) for other in TILE_LISTS[: TILE_LISTS.index(which)])
    return values[first : first + len(which.row_shapes())]


def wanted(device: torch.device) -> bool:
    """Whether plans for ``device`` have tile lists: the backends of the CPU walk the plan itself."""
    return device.type == "cuda"


def derive(plan: Sequence[torch.Tensor], *, split: bool) -> list:
    """Return the planner's lists for the fields of a plan, which must be on the CPU.

    ``split``: whether groups of keys with much work may become several units.
    """
    addresses = [tensor.data_ptr() for tensor in plan]
    make = extension.planner().tile_lists
    return [make(addresses, *tile_list, split and tile_list.keys) for tile_list in TILE_LISTS]


def sizes(lists: list) -> list[int]:
    """Return the rows of each tensor of ``lists``; never 0 or 1, which torch.compile would make variants for."""
    return [
        # Two slots are what a list without any has: a group in two parts gets one more.
        max(3 if kind == 3 and rows else 2, rows)
        for tile_list, built in zip(TILE_LISTS, lists)
        for kind, rows in enumerate(built.rows()[: len(tile_list.row_shapes())])
    ]


def capacity(q_blocks: int, kv_blocks: int, full: int, partial: int, full_t: int) -> list[int]:
    """Return the rows that the lists of a plan of these capacities have; none of their groups is split.

    A range of a group starts where one of its blocks' does, so there are no more. A block by itself has its partial
    tiles and at most 3 tiles left over from each range. In a group entries may be more where its blocks see different
    rows; the factor of 4 lets each block keep its own.
    """
    rows = []
    for tile_list in TILE_LISTS:
        blocks, ranges = (kv_blocks, full_t) if tile_list.keys else (q_blocks, full)
        entries = partial + 3 * ranges if tile_list.group == 1 else 4 * (partial + ranges)
        rows += [-(-blocks // tile_list.group) + 1, ranges, entries, *([0] if tile_list.keys else [])]
    return [max(2, count) for count in rows]


def write(lists: list, buffer: int, offsets: Sequence[int], rows: Sequence[int]) -> None:
    """Write ``lists`` to a buffer at this address, at word ``offsets``; see ``capacity`` for what fits."""
    for number, (tile_list, built) in enumerate(zip(TILE_LISTS, lists)):
        room, at = tensors_of(rows, tile_list), tensors_of(offsets, tile_list)
        needed = built.rows()
        if any(need > have for need, have in zip(needed, room)):
            raise ValueError(
                f"capacity: got room for {room[2]} entries of tile list {number}, needs {needed[2]} for this batch; "
                "needs larger partial_tiles"
            )
        built.write(buffer, at, room)
