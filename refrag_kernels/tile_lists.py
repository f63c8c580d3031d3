"""Tile lists: what GPU kernels walk, derived from a plan when it is made for a GPU or moved to one.

A GPU's tiles have 64 rows and more: several blocks of 16 rows share one. A list groups ``group`` consecutive blocks of
one side of the plan and says which rows of the other side the group has to do with:

offsets [groups + 1, 2]
    The first range and the first entry of each group.
ranges [R, 2]
    Rows [start, end) of the other side that every row of the group sees, or is seen by. Multiples of 64 rows long, so
    that a kernel takes steps of up to 64 rows without a test.
entries [E, 2 + group]
    First row and number of rows (1 to 16) of a tile of the other side, and a code for each block of the group: -1
    skipped, -2 full, else an index into ``partial_bits``. A kernel takes several entries in a step, wherever they lie.

Groups may hold blocks of two sequences. Under a capacity the lists are longer than what ``offsets`` refers to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from refrag_kernels import extension


class TileList(NamedTuple):
    """One list: how it is made, and the fields of the plan that bound its size."""

    keys: bool  # whether it groups blocks of keys, and lists query rows
    group: int  # blocks per group


# Query rows for grouped-query attention, whose heads fill a tile by themselves; query rows for one or two heads per
# key/value head; keys, for their gradients.
TILE_LISTS = (TileList(False, 1), TileList(False, 4), TileList(True, 4))

ROW_SHAPES = [shape for tile_list in TILE_LISTS for shape in ((2,), (2,), (2 + tile_list.group,))]


def wanted(device: torch.device) -> bool:
    """Whether plans for ``device`` have tile lists: the backends of the CPU walk the plan itself."""
    return device.type == "cuda"


def derive(plan: Sequence[torch.Tensor]) -> list:
    """Return the planner's lists for the 14 fields of a plan, which must be on the CPU."""
    addresses = [tensor.data_ptr() for tensor in plan]
    return [extension.planner().tile_lists(addresses, *tile_list) for tile_list in TILE_LISTS]


def sizes(lists: list) -> list[int]:
    """Return the rows of each tensor of ``lists``; never 0 or 1, which torch.compile would make variants for."""
    return [max(2, rows) for built in lists for rows in built.rows()]


def capacity(q_blocks: int, kv_blocks: int, full: int, partial: int, full_t: int) -> list[int]:
    """Return the rows that the lists of a plan of these capacities have.

    A range of a group starts where one of its blocks' does, so there are no more. A block by itself has its partial
    tiles and at most 3 tiles left over from each range. In a group entries may be more where its blocks see different
    rows; the factor of 4 lets each block keep its own.
    """
    rows = []
    for tile_list in TILE_LISTS:
        blocks, ranges = (kv_blocks, full_t) if tile_list.keys else (q_blocks, full)
        entries = partial + 3 * ranges if tile_list.group == 1 else 4 * (partial + ranges)
        rows += [-(-blocks // tile_list.group) + 1, ranges, entries]
    return [max(2, count) for count in rows]


def write(lists: list, buffer: int, offsets: Sequence[int], rows: Sequence[int]) -> None:
    """Write ``lists`` to a buffer at this address, at word ``offsets``; see ``capacity`` for what fits."""
    for i, built in enumerate(lists):
        needed, room = built.rows(), rows[3 * i : 3 * i + 3]
        if any(need > have for need, have in zip(needed, room)):
            raise ValueError(
                f"capacity: got room for {room[2]} entries of tile list {i}, needs {needed[2]} for this batch; "
                "needs larger partial_tiles"
            )
        built.write(buffer, offsets[3 * i : 3 * i + 3], room)
