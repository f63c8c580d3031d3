"""An attention plan computed by brute force from a dense matrix of allowed pairs, to check the planner."""

import torch

TILE = 16


def plan_tensors(allowed: torch.Tensor, q_offsets: list[int], kv_offsets: list[int]) -> dict[str, torch.Tensor]:
    """Return a plan's fields for ``allowed`` [T_q, T_kv], by name.

    ``q_offsets`` and ``kv_offsets`` hold each sequence's first row and, at the end, the number of rows.
    """
    q_blocks, q_row_block = _blocks(q_offsets, kv_offsets)
    kv_blocks, kv_row_block = _blocks(kv_offsets, q_offsets)
    full, partial_keys, partial_bits, tiles = [], [], [], []
    full_offsets, partial_offsets = [0], [0]
    full_of_tile = {}
    for block, (q_first, q_count, kv_start, kv_rows) in enumerate(q_blocks):
        ranges = []
        for first in range(kv_start, kv_start + kv_rows, TILE):
            count = min(TILE, kv_start + kv_rows - first)
            pairs = allowed[q_first : q_first + q_count, first : first + count]
            if pairs.all() and count == TILE:
                if ranges and ranges[-1][1] == first:
                    ranges[-1][1] += TILE
                else:
                    ranges.append([first, first + TILE])
                full_of_tile.setdefault(kv_row_block[first], []).append(block)
            elif pairs.any():
                tiles.append((kv_row_block[first], block, len(partial_keys)))
                partial_keys.append(first)
                words = [0] * (TILE // 2)
                for row, column in pairs.nonzero().tolist():
                    words[row // 2] |= 1 << (16 * (row % 2) + column)
                partial_bits.append([word - (1 << 32) if word >= 1 << 31 else word for word in words])
        full += ranges
        full_offsets.append(len(full))
        partial_offsets.append(len(partial_keys))
    full_t, full_t_offsets, partial_t, partial_t_offsets = [], [0], [], [0]
    for tile in range(len(kv_blocks)):
        ranges = []
        for block in full_of_tile.get(tile, []):
            start, count = q_blocks[block][:2]
            if ranges and ranges[-1][1] == start:
                ranges[-1][1] += count
            else:
                ranges.append([start, start + count])
        full_t += ranges
        full_t_offsets.append(len(full_t))
        partial_t += [(block, index) for of, block, index in tiles if of == tile]
        partial_t_offsets.append(len(partial_t))
    counts = (len(q_row_block), len(kv_row_block), len(q_blocks), len(kv_blocks), len(full), len(partial_keys))
    return {
        "sizes": torch.tensor([*counts, len(full_t), len(q_offsets) - 1], dtype=torch.int32),
        "q_row_block": _int32(q_row_block),
        "kv_row_block": _int32(kv_row_block),
        "q_blocks": _int32(q_blocks, 4),
        "full_offsets": _int32(full_offsets),
        "full_ranges": _int32(full, 2),
        "partial_offsets": _int32(partial_offsets),
        "partial_keys": _int32(partial_keys),
        "partial_bits": _int32(partial_bits, TILE // 2),
        "kv_blocks": _int32(kv_blocks, 4),
        "full_t_offsets": _int32(full_t_offsets),
        "full_t_ranges": _int32(full_t, 2),
        "partial_t_offsets": _int32(partial_t_offsets),
        "partial_t_tiles": _int32(partial_t, 2),
    }


def _blocks(offsets: list[int], other_offsets: list[int]) -> tuple[list, list]:
    blocks, block_of_row = [], []
    for sequence, (start, end) in enumerate(zip(offsets, offsets[1:])):
        other = other_offsets[sequence]
        for first in range(start, end, TILE):
            block_of_row += [len(blocks)] * min(TILE, end - first)
            blocks.append((first, min(TILE, end - first), other, other_offsets[sequence + 1] - other))
    return blocks, block_of_row


def _int32(values: list, width: int = 0) -> torch.Tensor:
    return (
        torch.tensor(values, dtype=torch.int32).reshape(-1, width) if width else torch.tensor(values, dtype=torch.int32)
    )
