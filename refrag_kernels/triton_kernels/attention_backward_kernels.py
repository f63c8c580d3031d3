"""The backward kernels of mixed_attention: delta and dsinks, dq by tiles of query rows, dk and dv by tiles of keys.

One program writes each gradient and adds its terms in the order of the plan. There are no atomics, so gradients are
bitwise reproducible.
"""

import triton
import triton.language as tl

from refrag_kernels.triton_kernels.nonfinite import all_finite, repair_keys, repair_rows
from refrag_kernels.triton_kernels.tiles import (
    LOG2E,
    attending_rows,
    block_rows,
    fill_rows,
    load_rows,
    load_step,
    load_work_item,
    next_step,
    partial_tile_rows,
    scores,
    tile_and_column,
    visible_keys,
)


@triton.jit
def mixed_attention_delta_kernel(
    p_grad_out,  # [T_q, H_q, D]
    p_grad_lse,  # [T_q, H_q] float32
    p_out,  # [T_q, H_q, D]
    p_lse,  # [T_q, H_q] float32
    p_sinks,  # [H_q] float32
    p_sizes,  # [8]
    p_delta,  # [T_q, H_q] float32
    p_dsinks,  # [programs along the rows, H_q] float32, to be summed
    q_rows,
    stride_gt,
    stride_gh,
    stride_ot,
    stride_oh,
    BLOCK_M: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Write delta = dout . out - dlse, 0 beyond the batch, and this program's part of the gradient of a head's sink."""
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    o_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BD)
    m_row = o_row < tl.load(p_sizes)
    b_grad = load_rows(p_grad_out + head.to(tl.int64) * stride_gh, o_row, m_row, o_d, stride_gt, D)
    b_out = load_rows(p_out + head.to(tl.int64) * stride_oh, o_row, m_row, o_d, stride_ot, D)
    at = o_row.to(tl.int64) * heads + head
    b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
    b_delta -= tl.load(p_grad_lse + at, mask=m_row, other=0.0)
    # Fully masked rows have lse -inf; the gradient with respect to it is dropped.
    b_lse = tl.load(p_lse + at, mask=m_row, other=float("-inf"))
    b_delta = tl.where(b_lse == float("-inf"), 0.0, b_delta)
    tl.store(p_delta + at, b_delta, mask=o_row < q_rows)
    if SINKS:
        b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse)
        b_p = tl.exp2((tl.load(p_sinks + head) - b_lse) * LOG2E)
        tl.store(p_dsinks + tl.program_id(0) * heads + head, -tl.sum(b_p * b_delta))


@triton.jit
def _dq_step(
    b_q, b_do, b_lse, b_delta, b_dq, b_k, b_v, visible, scale, softcap,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = b_q.dtype == tl.float32
    b_s, slope = scores(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), scale, softcap, SOFTCAP, EXACT)
    b_p = tl.exp2(b_s - b_lse[:, None])
    if MASKED:
        b_p = tl.where(visible, b_p, 0.0)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[:, None])
    if SOFTCAP:
        b_ds *= slope
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["section", "ahead"])
def mixed_attention_bwd_dq_kernel(
    p_q,  # [T_q, H_q, D]
    p_k,  # [T_kv, H_kv, D]
    p_v,  # [T_kv, H_kv, D]
    p_grad_out,  # [T_q, H_q, D]
    p_lse,  # [T_q, H_q] float32
    p_delta,  # [T_q, H_q] float32
    p_dq,  # [T_q, H_q, D]
    p_sizes,  # [8], the first of the plan's tensors
    p_blocks,  # [NB, 4]
    p_bits,  # [P, 8]
    p_work_items,  # [work items + 1, 5]
    p_ranges,  # [R, 2]
    p_partial_tiles,  # [E, TILE_WORDS]
    scale,
    softcap,
    q_rows,
    num_blocks,
    section,  # columns of the grid, see tile_and_column
    ahead,  # tiles
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_gt,
    stride_gh,
    stride_dt,
    stride_dh,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TILE_WORDS: tl.constexpr = 2 + BLOCKS
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    tile, column = tile_and_column(section, ahead)
    tile = tl.num_programs(0) - 1 - tile
    kv_head = column // HEAD_TILES
    o_m = tl.arange(0, BLOCKS * 16 * HEADS)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BD)
    o_block = o_m // (16 * HEADS)
    o_row = o_m // HEADS % 16
    head_of_group = column % HEAD_TILES * HEADS + o_m % HEADS
    m_head = head_of_group < GROUP
    head = (kv_head * GROUP + head_of_group).to(tl.int64)
    heads = tl.num_programs(1) // HEAD_TILES * GROUP

    rows, m_rows = block_rows(p_blocks, tile * BLOCKS + o_block, o_row, num_blocks)
    rows = rows.to(tl.int64)
    m_rows = m_rows & m_head
    m_tile = m_rows[:, None] & (o_d[None, :] < D)
    b_q = tl.load(
        p_q + rows[:, None] * stride_qt + head[:, None] * stride_qh + o_d[None, :], mask=m_tile, other=0.0
    )  # [BM, BD]
    b_do = tl.load(
        p_grad_out + rows[:, None] * stride_gt + head[:, None] * stride_gh + o_d[None, :], mask=m_tile, other=0.0
    )
    b_lse = tl.load(p_lse + rows * heads + head, mask=m_rows, other=0.0) * LOG2E
    b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse)
    b_delta = tl.load(p_delta + rows * heads + head, mask=m_rows, other=0.0)
    p_keys, p_values, p_all_work_items = p_k, p_v, p_work_items  # unmodified, for repair_rows
    p_k += kv_head.to(tl.int64) * stride_kh
    p_v += kv_head.to(tl.int64) * stride_vh

    b_dq = tl.zeros([BLOCKS * 16 * HEADS, BD], tl.float32)
    p_work_items += tile * 5
    first_range, last_range, steps, key, key_end = load_work_item(p_work_items, p_ranges, BLOCK_N)
    index = first_range
    for _ in range(0, steps):
        b_k = load_step(p_k, key, o_n, o_d, stride_kt, D, WIDE)  # [BLOCK_N, BD]
        b_v = load_step(p_v, key, o_n, o_d, stride_vt, D, WIDE)
        b_dq = _dq_step(b_q, b_do, b_lse, b_delta, b_dq, b_k, b_v, None, scale, softcap, SOFTCAP, PRECISION, False)
        index, key, key_end = next_step(p_ranges, first_range, last_range, index, key, key_end, BLOCK_N)
    end = tl.load(p_work_items + 6)
    for partial_tile in range(tl.load(p_work_items + 1), end, BLOCK_N // 16):
        o_key, m_key = partial_tile_rows(p_partial_tiles, partial_tile, end, o_n, TILE_WORDS)
        visible = visible_keys(p_bits, p_partial_tiles, partial_tile, end, o_block, o_row, o_n, TILE_WORDS, BLOCK_N)
        b_k = load_rows(p_k, o_key, m_key, o_d, stride_kt, D)
        b_v = load_rows(p_v, o_key, m_key, o_d, stride_vt, D)
        visible &= m_key[None, :]
        b_dq = _dq_step(b_q, b_do, b_lse, b_delta, b_dq, b_k, b_v, visible, scale, softcap, SOFTCAP, PRECISION, True)
    finite = all_finite(b_dq)
    p_rows = p_dq + rows[:, None] * stride_dt + head[:, None] * stride_dh + o_d[None, :]
    tl.store(p_rows, (b_dq * scale).to(p_dq.dtype.element_ty), mask=m_tile)

    TILE_ROWS: tl.constexpr = BLOCKS * 16
    first = tl.load(p_sizes) + tile * TILE_ROWS
    fill_rows(
        p_dq, first, q_rows, tl.num_programs(0) * TILE_ROWS, o_m, head, m_head, o_d, stride_dt, stride_dh, HEADS, D
    )
    if not finite:
        tl.debug_barrier()  # the repair overwrites dq
        repair_rows(
            p_q, p_keys, p_values, p_grad_out, p_lse, p_delta, p_dq, p_blocks, p_bits, p_all_work_items, p_ranges,
            p_partial_tiles, scale, softcap, num_blocks, section, ahead, stride_qt, stride_qh, stride_kt, stride_kh,
            stride_vt, stride_vh, stride_gt, stride_gh, stride_dt, stride_dh, True, GROUP, HEADS, BLOCKS, D, BD, WIDE,
            SOFTCAP,
        )  # fmt: skip


@triton.jit
def _dkv_step(
    b_k, b_v, b_dk, b_dv, b_q, b_do, b_lse, b_delta, visible, scale, softcap,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add a step of one head's query rows to dk and dv of a tile. Scores are transposed, [BLOCK_M, BLOCK_N]."""
    EXACT: tl.constexpr = b_k.dtype == tl.float32
    b_s, slope = scores(tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION), scale, softcap, SOFTCAP, EXACT)
    b_p = tl.exp2(b_s - (b_lse * LOG2E)[None, :])
    if MASKED:
        b_p = tl.where(visible, b_p, 0.0)
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[None, :])
    if SOFTCAP:
        b_ds *= slope
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit
def mixed_attention_bwd_dkv_kernel(
    p_q,  # [T_q, H_q, D]
    p_k,  # [T_kv, H_kv, D]
    p_v,  # [T_kv, H_kv, D]
    p_grad_out,  # [T_q, H_q, D]
    p_lse,  # [T_q, H_q] float32
    p_delta,  # [T_q, H_q] float32
    p_dk,  # [T_kv, H_kv, D]
    p_dv,  # [T_kv, H_kv, D]
    p_partial_sums,  # [2, num_partials, H_kv, 64, D] float32: dk and dv of the partials
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
    num_partials,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_gt,
    stride_gh,
    stride_dt,
    stride_dh,
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
    """Compute dk and dv of BLOCK_M keys of a tile of four blocks, over all query heads of a key/value head.

    If the query rows of a tile are split among several work items, each of them writes its sums to a partial, which
    ``mixed_attention_bwd_sum_kernel`` adds up.
    """
    TILE_WORDS: tl.constexpr = 6
    PARTS: tl.constexpr = 64 // BLOCK_M
    # Under a causal mask the most rows attend to the first tiles, which start first as they are numbered.
    work_item = tl.program_id(TILES) // PARTS
    p_all_work_items = p_work_items  # unmodified, for repair_keys
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
    b_v = load_rows(p_v + kv_head * stride_vh, rows, m_rows, o_d, stride_vt, D)
    b_dk = tl.zeros([BLOCK_M, BD], tl.float32)
    b_dv = tl.zeros([BLOCK_M, BD], tl.float32)
    first_range, last_range, steps, query, query_end = load_work_item(p_work_items, p_ranges, BLOCK_N)
    index = first_range
    for step in range(0, steps * GROUP):  # all steps of one head, then those of the next
        head = kv_head * GROUP + step // steps
        b_q = load_step(p_q + head * stride_qh, query, o_n, o_d, stride_qt, D, WIDE)  # [BLOCK_N, BD]
        b_do = load_step(p_grad_out + head * stride_gh, query, o_n, o_d, stride_gt, D, WIDE)
        at = query.to(tl.int64) * heads + head + o_n * heads
        b_dk, b_dv = _dkv_step(
            b_k, b_v, b_dk, b_dv, b_q, b_do, tl.load(p_lse + at), tl.load(p_delta + at), None, scale, softcap,
            SOFTCAP, PRECISION, False,
        )  # fmt: skip
        index, query, query_end = next_step(p_ranges, first_range, last_range, index, query, query_end, BLOCK_N)
    # One partial tile per iteration without pipelining: the masks of longer steps, or of several stages, spill.
    o_e = tl.arange(0, 16)
    first_partial_tile = tl.load(p_work_items + 1)
    end_partial_tile = tl.load(p_work_items + 6)
    head = kv_head * GROUP
    partial_tile = first_partial_tile
    for _ in tl.range(0, (end_partial_tile - first_partial_tile) * GROUP, num_stages=1):
        o_query, m_query = partial_tile_rows(p_partial_tiles, partial_tile, end_partial_tile, o_e, TILE_WORDS)
        visible = attending_rows(p_bits, p_partial_tiles, partial_tile, end_partial_tile, o_m, o_e, TILE_WORDS)
        b_q = load_rows(p_q + head * stride_qh, o_query, m_query, o_d, stride_qt, D)
        b_do = load_rows(p_grad_out + head * stride_gh, o_query, m_query, o_d, stride_gt, D)
        at = o_query.to(tl.int64) * heads + head
        b_lse = tl.load(p_lse + at, mask=m_query, other=0.0)
        b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse)
        b_delta = tl.load(p_delta + at, mask=m_query, other=0.0)
        b_dk, b_dv = _dkv_step(
            b_k, b_v, b_dk, b_dv, b_q, b_do, b_lse, b_delta, visible & m_query[None, :], scale, softcap,
            SOFTCAP, PRECISION, True,
        )  # fmt: skip
        partial_tile += 1
        head += (partial_tile == end_partial_tile).to(tl.int64)
        partial_tile = tl.where(partial_tile == end_partial_tile, first_partial_tile, partial_tile)
    finite = all_finite(b_dk + b_dv)
    b_dk *= scale
    partial = tl.load(p_work_items + 4)
    if partial >= 0:
        at = partial_offsets(partial, kv_heads, kv_head, o_m, o_d, D)
        m_d = (o_d < D)[None, :]
        tl.store(p_partial_sums + at, b_dk, mask=m_d)
        tl.store(p_partial_sums + num_partials.to(tl.int64) * kv_heads * 64 * D + at, b_dv, mask=m_d)
    else:
        at = rows.to(tl.int64)[:, None] * stride_dt + kv_head * stride_dh + o_d[None, :]
        m_tile = m_rows[:, None] & (o_d[None, :] < D)
        tl.store(p_dk + at, b_dk.to(p_dk.dtype.element_ty), mask=m_tile)
        tl.store(p_dv + at, b_dv.to(p_dv.dtype.element_ty), mask=m_tile)

    first = tl.load(p_sizes + 1) + work_item * 64
    stride = tl.num_programs(TILES) // PARTS * 64
    o_head = tl.zeros([BLOCK_M], tl.int64) + kv_head
    fill_rows(p_dk, first, kv_rows, stride, o_m, o_head, o_m >= 0, o_d, stride_dt, stride_dh, 1, D)
    fill_rows(p_dv, first, kv_rows, stride, o_m, o_head, o_m >= 0, o_d, stride_dt, stride_dh, 1, D)
    if not finite:
        tl.debug_barrier()  # the repair overwrites dk and dv
        repair_keys(
            p_q, p_k, p_v, p_grad_out, p_lse, p_delta, p_dk, p_dv, p_partial_sums, p_blocks, p_bits, p_all_work_items,
            p_ranges, p_partial_tiles, scale, softcap, num_blocks, num_partials, stride_qt, stride_qh, stride_kt,
            stride_kh, stride_vt, stride_vh, stride_gt, stride_gh, stride_dt, stride_dh, GROUP, BLOCK_M, D, BD, WIDE,
            SOFTCAP, TILES,
        )  # fmt: skip


@triton.jit
def partial_offsets(partial, kv_heads, kv_head, o_m, o_d, D: tl.constexpr):
    """Return the offsets of rows ``o_m`` of a partial in [num_partials, H_kv, 64, D]."""
    row = (partial.to(tl.int64) * kv_heads + kv_head) * 64 + o_m
    return row[:, None] * D + o_d[None, :]


@triton.jit
def mixed_attention_bwd_sum_kernel(
    p_partial_sums,  # [2, num_partials, H_kv, 64, D] float32
    p_partials,  # [num_partials]: the tile of each, ascending; -1 beyond the last
    p_blocks,  # [NK, 4]
    p_dk,  # [T_kv, H_kv, D]
    p_dv,  # [T_kv, H_kv, D]
    num_partials,
    num_blocks,
    stride_dt,
    stride_dh,
    BLOCK_M: tl.constexpr,  # rows per program, of a tile's 64
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """Add up the partials of a tile in order. The program of a tile's first partial does; the others return."""
    first = tl.program_id(0)
    tile = tl.load(p_partials + first)
    if (tile < 0) | (tl.load(p_partials + first - 1, mask=first > 0, other=-1) == tile):
        return
    kv_heads = tl.num_programs(1)
    kv_head = tl.program_id(1).to(tl.int64)
    o_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BD)
    m_d = (o_d < D)[None, :]
    distance = num_partials.to(tl.int64) * kv_heads * 64 * D
    b_dk = tl.zeros([BLOCK_M, BD], tl.float32)
    b_dv = tl.zeros([BLOCK_M, BD], tl.float32)
    partial = first
    same = tile
    while same == tile:
        at = partial_offsets(partial, kv_heads, kv_head, o_m, o_d, D)
        b_dk += tl.load(p_partial_sums + at, mask=m_d, other=0.0)
        b_dv += tl.load(p_partial_sums + distance + at, mask=m_d, other=0.0)
        partial += 1
        same = tl.load(p_partials + partial, mask=partial < num_partials, other=-1)
    rows, m_rows = block_rows(p_blocks, tile * 4 + o_m // 16, o_m % 16, num_blocks)
    at = rows.to(tl.int64)[:, None] * stride_dt + kv_head * stride_dh + o_d[None, :]
    tl.store(p_dk + at, b_dk.to(p_dk.dtype.element_ty), mask=m_rows[:, None] & m_d)
    tl.store(p_dv + at, b_dv.to(p_dv.dtype.element_ty), mask=m_rows[:, None] & m_d)
