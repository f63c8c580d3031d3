"""The kernels of attention_received: column sums of the attention matrix by tiles of keys, and the sum of partials.

The tile list is that of dk and dv. No matrix product follows the mask, so a NaN or inf needs no repair: it reaches
probabilities of its own rows and keys only.
"""

import triton
import triton.language as tl

from refrag_kernels.triton_kernels.tiles import (
    LOG2E,
    attending_rows,
    block_rows,
    load_rows,
    load_step,
    load_work_item,
    next_step,
    partial_tile_rows,
    scores,
)


@triton.jit
def _probabilities(b_k, b_q, b_lse, visible, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Return the transposed probabilities of a step of one head's query rows, [BLOCK_M, rows]."""
    EXACT: tl.constexpr = b_k.dtype == tl.float32
    b_s, _ = scores(tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION), scale, softcap, SOFTCAP, EXACT)
    return tl.where(visible, tl.exp2(b_s - (b_lse * LOG2E)[None, :]), 0.0)


@triton.jit
def attention_received_fwd_kernel(
    p_q,  # [T_q, H_q, D]
    p_k,  # [T_kv, H_kv, D]
    p_lse,  # [T_q, H_q] float32
    p_received,  # [T_kv, H_kv] float32
    p_partial_sums,  # [num_partials, H_kv, 64] float32
    p_sizes,  # [8], the first of the plan's tensors
    p_blocks,  # [NK, 4]
    p_bits,  # [P, 8]
    p_work_items,  # [work items + 1, 5]
    p_ranges,  # [R, 2]
    p_partial_tiles,  # [E, 6]
    scale,
    softcap,
    kv_rows,
    num_blocks,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,  # keys per program: 64, or fewer where 64 don't fit in shared memory
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    TILES: tl.constexpr,  # the grid axis of the tiles; the other one is that of the key/value heads
):
    """Sum the probabilities of BLOCK_M keys of a tile of four blocks, over all query heads of a key/value head."""
    TILE_WORDS: tl.constexpr = 6
    PARTS: tl.constexpr = 64 // BLOCK_M
    work_item = tl.program_id(TILES) // PARTS
    p_work_items += work_item * 5
    tile = tl.load(p_work_items + 3)
    kv_head = tl.program_id(1 - TILES).to(tl.int64)
    kv_heads = tl.num_programs(1 - TILES)
    heads = kv_heads * GROUP
    o_m = tl.program_id(TILES) % PARTS * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BD)
    rows, m_rows = block_rows(p_blocks, tile * 4 + o_m // 16, o_m % 16, num_blocks)
    b_k = load_rows(p_k + kv_head * stride_kh, rows, m_rows, o_d, stride_kt, D)  # [BLOCK_M, BD]
    b_full = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first_range, last_range, steps, query, query_end = load_work_item(p_work_items, p_ranges, BLOCK_N)
    index = first_range
    for step in range(0, steps * GROUP):  # all steps of one head, then those of the next
        head = kv_head * GROUP + step // steps
        b_q = load_step(p_q + head * stride_qh, query, o_n, o_d, stride_qt, D, WIDE)  # [BLOCK_N, BD]
        b_lse = tl.load(p_lse + (query.to(tl.int64) * heads + head + o_n * heads))
        visible = (b_lse != float("-inf"))[None, :]
        b_full += _probabilities(b_k, b_q, b_lse, visible, scale, softcap, SOFTCAP, PRECISION)
        index, query, query_end = next_step(p_ranges, first_range, last_range, index, query, query_end, BLOCK_N)
    b_sum = tl.sum(b_full, 1)
    # One partial tile per iteration without pipelining, as for dk and dv.
    o_e = tl.arange(0, 16)
    b_partial = tl.zeros([BLOCK_M, 16], tl.float32)
    first_partial_tile = tl.load(p_work_items + 1)
    end_partial_tile = tl.load(p_work_items + 6)
    head = kv_head * GROUP
    partial_tile = first_partial_tile
    for _ in tl.range(0, (end_partial_tile - first_partial_tile) * GROUP, num_stages=1):
        o_query, m_query = partial_tile_rows(p_partial_tiles, partial_tile, end_partial_tile, o_e, TILE_WORDS)
        visible = attending_rows(p_bits, p_partial_tiles, partial_tile, end_partial_tile, o_m, o_e, TILE_WORDS)
        b_q = load_rows(p_q + head * stride_qh, o_query, m_query, o_d, stride_qt, D)
        b_lse = tl.load(p_lse + (o_query.to(tl.int64) * heads + head), mask=m_query, other=float("-inf"))
        visible &= (b_lse != float("-inf"))[None, :]
        b_partial += _probabilities(b_k, b_q, b_lse, visible, scale, softcap, SOFTCAP, PRECISION)
        partial_tile += 1
        head += (partial_tile == end_partial_tile).to(tl.int64)
        partial_tile = tl.where(partial_tile == end_partial_tile, first_partial_tile, partial_tile)
    b_sum += tl.sum(b_partial, 1)
    partial = tl.load(p_work_items + 4)
    if partial >= 0:
        tl.store(p_partial_sums + (partial.to(tl.int64) * kv_heads + kv_head) * 64 + o_m, b_sum)
    else:
        tl.store(p_received + rows.to(tl.int64) * kv_heads + kv_head, b_sum, mask=m_rows)
    zeros = tl.zeros([BLOCK_M], tl.float32)
    for first in range(tl.load(p_sizes + 1) + work_item * 64, kv_rows, tl.num_programs(TILES) // PARTS * 64):
        o_row = first + o_m
        tl.store(p_received + o_row.to(tl.int64) * kv_heads + kv_head, zeros, mask=o_row < kv_rows)


@triton.jit
def attention_received_sum_kernel(
    p_partial_sums,  # [num_partials, H_kv, 64] float32
    p_partials,  # [num_partials]: the tile of each, ascending; -1 beyond the last
    p_blocks,  # [NK, 4]
    p_received,  # [T_kv, H_kv] float32
    num_partials,
    num_blocks,
):
    """Add up the partials of a tile in order. The program of a tile's first partial does; the others return."""
    partial = tl.program_id(0)
    tile = tl.load(p_partials + partial)
    if (tile < 0) | (tl.load(p_partials + partial - 1, mask=partial > 0, other=-1) == tile):
        return
    kv_heads = tl.num_programs(1)
    kv_head = tl.program_id(1)
    o_m = tl.arange(0, 64)
    b_sum = tl.zeros([64], tl.float32)
    same = tile
    while same == tile:
        b_sum += tl.load(p_partial_sums + (partial.to(tl.int64) * kv_heads + kv_head) * 64 + o_m)
        partial += 1
        same = tl.load(p_partials + partial, mask=partial < num_partials, other=-1)
    rows, m_rows = block_rows(p_blocks, tile * 4 + o_m // 16, o_m % 16, num_blocks)
    tl.store(p_received + rows.to(tl.int64) * kv_heads + kv_head, b_sum, mask=m_rows)
