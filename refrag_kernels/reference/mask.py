"""The specification of a plan in plain torch: which pairs of rows are allowed, and which ones a plan allows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from refrag_kernels.layout import ChunkLayout
from refrag_kernels.mask import ChunkMask, MaskKind
from refrag_kernels.plan_fields import PlanField


def chunk_pairs(layout: ChunkLayout, mask: ChunkMask) -> torch.Tensor:
    """Return the bool matrix [C, C] of which chunk may attend to which chunk."""
    layout = layout.host()
    chunks = torch.arange(layout.num_chunks, device="cpu")
    sequence = torch.bucketize(chunks, layout.sequence_chunks[1:].long(), right=True)
    same_sequence = sequence[:, None] == sequence[None, :]
    if mask.kind == MaskKind.FULL:
        return same_sequence
    if mask.kind == MaskKind.DIAGONAL:
        return torch.eye(layout.num_chunks, dtype=torch.bool, device="cpu")
    if mask.kind == MaskKind.PASSAGES:
        passage = mask.passage_of_chunk
        assert passage is not None
        shared = passage < 0
        return same_sequence & (shared[:, None] | shared[None, :] | (passage[:, None] == passage[None, :]))
    assert mask.indptr is not None and mask.indices is not None
    allowed = torch.zeros(layout.num_chunks, layout.num_chunks, dtype=torch.bool, device="cpu")
    allowed[chunks.repeat_interleave(mask.indptr.diff()), mask.indices.long()] = True
    return allowed


def allowed_pairs(
    layout: ChunkLayout,
    mask: ChunkMask,
    *,
    causal: bool = True,
    window: int | tuple[int, int] | None = None,
    kv_layout: ChunkLayout | None = None,
) -> torch.Tensor:
    """Return the bool matrix [T_q, T_kv] that ``plan_attention`` allows for the same arguments."""
    keys = (layout if kv_layout is None else kv_layout).host()
    layout = layout.host()
    key_rows = torch.arange(keys.total_rows, device="cpu")
    key_chunk = torch.bucketize(key_rows, keys.chunk_offsets[1:].long(), right=True)
    key_sequence = torch.bucketize(key_rows, keys.sequence_offsets[1:].long(), right=True)
    key_position = key_rows - keys.sequence_offsets.long()[key_sequence]

    query_rows = torch.arange(layout.total_rows, device="cpu")
    query_sequence = torch.bucketize(query_rows, layout.sequence_offsets[1:].long(), right=True)
    # The query rows are the last rows of each sequence of the keys.
    from_end = layout.sequence_offsets.long()[query_sequence + 1] - query_rows
    query_as_key = keys.sequence_offsets.long()[query_sequence + 1] - from_end
    query_position = key_position[query_as_key]

    allowed = chunk_pairs(keys, mask)[key_chunk[query_as_key]][:, key_chunk]
    allowed &= query_sequence[:, None] == key_sequence[None, :]
    distance = key_position[None, :] - query_position[:, None]
    if causal:
        allowed &= distance <= 0
    if isinstance(window, int):
        allowed &= distance > -window
    elif window is not None:
        left, right = window
        if left >= 0:
            allowed &= distance >= -left
        if right >= 0:
            allowed &= distance <= right
    return allowed


def pairs_of_plan(plan: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the bool matrix [T_q, T_kv] that a plan allows, without synchronizing with the device."""
    q_row_block, q_blocks = plan[PlanField.Q_ROW_BLOCK], plan[PlanField.Q_BLOCKS]
    full_ranges, partial_keys = plan[PlanField.FULL_RANGES], plan[PlanField.PARTIAL_KEYS]
    device, num_blocks, num_keys = q_blocks.device, q_blocks.shape[0], plan[PlanField.KV_ROW_BLOCK].shape[0]

    def block_of(offsets: torch.Tensor, entries: int) -> torch.Tensor:
        # Entries beyond the last offset belong to no block: they go to an extra row that is cut off below.
        return torch.bucketize(torch.arange(entries, device=device, dtype=torch.int32), offsets[1:], right=True)

    # A full range adds 1 at its start and takes it away at its end; the running sum marks its keys.
    steps = torch.zeros(num_blocks + 1, num_keys + 1, dtype=torch.int32, device=device)
    range_block = block_of(plan[PlanField.FULL_OFFSETS], full_ranges.shape[0])
    one = torch.ones_like(range_block, dtype=torch.int32)
    steps.index_put_((range_block, full_ranges[:, 0].long()), one, accumulate=True)
    steps.index_put_((range_block, full_ranges[:, 1].long()), -one, accumulate=True)
    full = steps.cumsum(1)[:num_blocks, :num_keys] > 0

    row_block = q_row_block.long()
    in_batch = row_block >= 0
    row_block = row_block.clamp(min=0)
    # Rows beyond the batch are cut off below; until then they count as rows of block 0.
    row_in_block = (torch.arange(q_row_block.shape[0], device=device) - q_blocks[row_block, 0]).clamp(max=15)
    allowed = full[row_block]

    tile_block = block_of(plan[PlanField.PARTIAL_OFFSETS], partial_keys.shape[0])
    shifts = torch.arange(32, device=device, dtype=torch.int32)
    tile_bits = ((plan[PlanField.PARTIAL_BITS][:, :, None] >> shifts) & 1).bool().view(-1, 16, 16)  # [P, row, key]
    # Bits of keys beyond the last row are 0 and go to columns that are cut off.
    columns = partial_keys.long()[:, None] + torch.arange(16, device=device)
    partial = torch.zeros(num_blocks + 1, 16, num_keys + 16, dtype=torch.int32, device=device)
    partial.index_put_(
        (tile_block[:, None, None], torch.arange(16, device=device)[None, :, None], columns[:, None, :]),
        tile_bits.int(),
        accumulate=True,
    )
    allowed = allowed | (partial[row_block, row_in_block, :num_keys] > 0)
    return allowed & in_batch[:, None]
