"""The forward kernel of mixed_attention."""

import triton
import triton.language as tl

from refrag_kernels.triton_kernels.nonfinite import all_finite, repair_rows
from refrag_kernels.triton_kernels.tiles import (
    LN2,
    LOG2E,
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
def _step(
    b_q, b_k, b_v, b_acc, b_max, b_sum, visible, scale, softcap,
    SOFTCAP: tl.constexpr, FUSED: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Accumulate one step of keys: the online-softmax update of a tile's output and its rows' maximum and sum."""
    EXACT: tl.constexpr = b_q.dtype == tl.float32
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if not FUSED:
        b_s, _ = scores(b_s, scale, softcap, SOFTCAP, EXACT)
    if MASKED:
        b_s = tl.where(visible, b_s, float("-inf"))
    new_max = tl.maximum(b_max, tl.max(b_s, 1))
    base = new_max
    if MASKED:
        # Rows that have not attended to a key yet: -inf - -inf would be NaN.
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
    if FUSED:
        # Scaling and subtraction are one instruction per score.
        factor = scale * LOG2E
        b_p = tl.exp2(b_s * factor - (base * factor)[:, None])
        decay = tl.exp2((b_max - base) * factor)
    else:
        b_p = tl.exp2(b_s - base[:, None])
        decay = tl.exp2(b_max - base)
    b_sum = b_sum * decay + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * decay[:, None], input_precision=PRECISION)
    return b_acc, new_max, b_sum


@triton.jit(do_not_specialize=["section", "ahead"])
def mixed_attention_fwd_kernel(
    p_q,  # [T_q, H_q, D]
    p_k,  # [T_kv, H_kv, D]
    p_v,  # [T_kv, H_kv, D]
    p_out,  # [T_q, H_q, D]
    p_lse,  # [T_q, H_q] float32
    p_sinks,  # [H_q] float32
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
    stride_ot,
    stride_oh,
    GROUP: tl.constexpr,  # query heads per key/value head
    HEADS: tl.constexpr,  # of those, heads in a tile
    BLOCKS: tl.constexpr,  # of 16 query rows, in a tile
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
    SINKS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FUSED: tl.constexpr,  # b_max holds unscaled products, as the scale is positive and there is no softcap
    PRECISION: tl.constexpr,
):
    TILE_WORDS: tl.constexpr = 2 + BLOCKS
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    tile, column = tile_and_column(section, ahead)
    # Under a causal mask the last tiles attend to the most keys, so they start first.
    tile = tl.num_programs(0) - 1 - tile
    kv_head = column // HEAD_TILES
    o_m = tl.arange(0, BLOCKS * 16 * HEADS)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BD)
    o_block = o_m // (16 * HEADS)
    o_row = o_m // HEADS % 16
    head_of_group = column % HEAD_TILES * HEADS + o_m % HEADS
    m_head = head_of_group < GROUP
    head = kv_head * GROUP + head_of_group

    rows, m_rows = block_rows(p_blocks, tile * BLOCKS + o_block, o_row, num_blocks)
    m_rows = m_rows & m_head
    p_rows = rows.to(tl.int64)[:, None] * stride_qt + head.to(tl.int64)[:, None] * stride_qh + o_d[None, :]
    b_q = tl.load(p_q + p_rows, mask=m_rows[:, None] & (o_d[None, :] < D), other=0.0)  # [BM, BD]
    p_keys, p_values, p_all_work_items = p_k, p_v, p_work_items  # unmodified, for repair_rows
    p_k += kv_head.to(tl.int64) * stride_kh
    p_v += kv_head.to(tl.int64) * stride_vh

    b_acc = tl.zeros([BLOCKS * 16 * HEADS, BD], tl.float32)
    b_max = tl.full([BLOCKS * 16 * HEADS], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCKS * 16 * HEADS], tl.float32)
    p_work_items += tile * 5
    first_range, last_range, steps, key, key_end = load_work_item(p_work_items, p_ranges, BLOCK_N)
    index = first_range
    for _ in range(0, steps):
        b_k = load_step(p_k, key, o_n, o_d, stride_kt, D, WIDE)  # [BLOCK_N, BD]
        b_v = load_step(p_v, key, o_n, o_d, stride_vt, D, WIDE)
        b_acc, b_max, b_sum = _step(
            b_q, b_k, b_v, b_acc, b_max, b_sum, None, scale, softcap, SOFTCAP, FUSED, PRECISION, False
        )
        index, key, key_end = next_step(p_ranges, first_range, last_range, index, key, key_end, BLOCK_N)
    end = tl.load(p_work_items + 6)
    for partial_tile in range(tl.load(p_work_items + 1), end, BLOCK_N // 16):
        o_key, m_key = partial_tile_rows(p_partial_tiles, partial_tile, end, o_n, TILE_WORDS)
        visible = visible_keys(p_bits, p_partial_tiles, partial_tile, end, o_block, o_row, o_n, TILE_WORDS, BLOCK_N)
        b_k = load_rows(p_k, o_key, m_key, o_d, stride_kt, D)
        b_v = load_rows(p_v, o_key, m_key, o_d, stride_vt, D)
        b_acc, b_max, b_sum = _step(
            b_q, b_k, b_v, b_acc, b_max, b_sum, visible & m_key[None, :], scale, softcap, SOFTCAP, FUSED, PRECISION,
            True,
        )  # fmt: skip

    if FUSED:
        b_max *= scale * LOG2E
    finite = all_finite(b_acc)
    if SINKS:
        b_sink = tl.load(p_sinks + head, mask=m_head, other=float("-inf")) * LOG2E
        new_max = tl.maximum(b_max, b_sink)
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay = tl.exp2(b_max - base)
        b_sum = b_sum * decay + tl.exp2(b_sink - base)
        b_acc *= decay[:, None]
        b_max = new_max
    attends = b_sum != 0  # False for fully masked rows
    b_out = b_acc / tl.where(attends, b_sum, 1.0)[:, None]
    b_lse = tl.where(attends, (b_max + tl.log2(tl.where(attends, b_sum, 1.0))) * LN2, float("-inf"))
    p_rows = rows.to(tl.int64)[:, None] * stride_ot + head.to(tl.int64)[:, None] * stride_oh + o_d[None, :]
    tl.store(p_out + p_rows, b_out.to(p_out.dtype.element_ty), mask=m_rows[:, None] & (o_d[None, :] < D))
    heads = tl.num_programs(1) // HEAD_TILES * GROUP
    tl.store(p_lse + rows.to(tl.int64) * heads + head, b_lse, mask=m_rows)

    # Rows beyond the batch, under a capacity.
    TILE_ROWS: tl.constexpr = BLOCKS * 16
    first = tl.load(p_sizes) + tile * TILE_ROWS
    stride = tl.num_programs(0) * TILE_ROWS
    fill_rows(p_out, first, q_rows, stride, o_m, head.to(tl.int64), m_head, o_d, stride_ot, stride_oh, HEADS, D)
    for start in range(first, q_rows, stride):
        o_fill = start + o_m // HEADS
        empty = tl.full([BLOCKS * 16 * HEADS], float("-inf"), tl.float32)
        tl.store(p_lse + o_fill.to(tl.int64) * heads + head, empty, mask=(o_fill < q_rows) & m_head)
    if not finite:
        tl.debug_barrier()  # the repair reads and overwrites out and lse
        repair_rows(
            p_q, p_keys, p_values, p_q, p_lse, p_lse, p_out, p_blocks, p_bits, p_all_work_items, p_ranges,
            p_partial_tiles, scale, softcap, num_blocks, section, ahead, stride_qt, stride_qh, stride_kt, stride_kh,
            stride_vt, stride_vh, stride_qt, stride_qh, stride_ot, stride_oh, False, GROUP, HEADS, BLOCKS, D, BD, WIDE,
            SOFTCAP,
        )  # fmt: skip
