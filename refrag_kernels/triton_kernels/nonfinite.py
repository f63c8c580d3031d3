"""Repairs of tiles whose accumulators are not finite, which attention kernels call at their end.

A row gives probability 0 to a key that it does not attend to. But 0 * NaN is NaN, and matrix products combine all keys
of a tile with all of its rows: a NaN or inf would spread to rows that merely share a tile with rows attending to it.
Therefore a kernel tests its accumulators once, after its loops. If one is not finite, a function of this module
computes the tile again, a few rows at a time and without matrix products, and overwrites the rows that a NaN reached by
mistake. This is slow, and rare.

The functions are not inlined and take only scalars and pointers, so they don't raise the register use of the kernels
that call them. They use no tl.dot, which Triton does not compile in such functions for sm_100.
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
    partial_tile_bits,
    partial_tile_rows,
    scores,
    tile_and_column,
)

# Rows per iteration: more would raise the kernels' use of registers and stack.
REPAIR_ROWS = tl.constexpr(1)


@triton.jit
def all_finite(b_sums):
    """Return whether all elements of a tile are finite."""
    return tl.sum(b_sums * 0.0) == 0.0  # one addition per element


@triton.jit
def _add(b_factors, b_rows, visible, b_sum, b_hidden):
    """Add the product of ``b_factors`` [R, 16] and ``b_rows`` [1, 16, BD] to ``b_sum`` [R, BD] for visible pairs.

    Hidden pairs, which a matrix product adds as well, are added to ``b_hidden``: it stays 0 or becomes NaN.
    """
    b_terms = b_factors[:, :, None] * b_rows
    b_sum += tl.sum(tl.where(visible[:, :, None], b_terms, 0.0), 1)
    b_hidden += tl.sum(tl.where(visible[:, :, None], 0.0, b_terms), 1)
    return b_sum, b_hidden


@triton.jit
def _products(b_own, b_rows):
    """Return the dot products of rows [R, BD] with rows [1, 16, BD], as [R, 16]."""
    return tl.sum(b_own[:, None, :] * b_rows, 2)


@triton.jit
def reached(b_sum, b_hidden):
    """Return for each row whether hidden pairs turn an element into NaN that is finite by the visible pairs."""
    return tl.max(((b_hidden != b_hidden) & (tl.abs(b_sum) < float("inf"))).to(tl.int32), 1) != 0


@triton.jit
def add_keys(
    b_q, b_grad, b_lse, b_delta, b_k, b_v, visible, b_sum, b_hidden, scale, softcap,
    BACKWARD: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Add 16 keys to the outputs of rows or, if ``BACKWARD``, to the rows' gradients before the scale."""
    b_k = b_k.to(tl.float32)[None, :, :]
    b_v = b_v.to(tl.float32)[None, :, :]
    b_s, slope = scores(_products(b_q, b_k), scale, softcap, SOFTCAP, EXACT)
    b_p = tl.where(visible, tl.exp2(b_s - b_lse[:, None]), 0.0)
    if BACKWARD:
        return _add(b_p * (_products(b_grad, b_v) - b_delta[:, None]) * slope, b_k, visible, b_sum, b_hidden)
    else:
        return _add(b_p, b_v, visible, b_sum, b_hidden)


@triton.jit(noinline=True)
def repair_rows(
    p_q, p_k, p_v, p_grad_out, p_lse, p_delta, p_out, p_blocks, p_bits, p_work_items, p_ranges, p_partial_tiles, scale,
    softcap, num_blocks, section, ahead, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_gt,
    stride_gh, stride_ot, stride_oh, BACKWARD: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
    BLOCKS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Rewrite rows of a tile's output in mixed_attention or, if ``BACKWARD``, rows of dq."""
    EXACT: tl.constexpr = p_q.dtype.element_ty == tl.float32
    TILE_WORDS: tl.constexpr = 2 + BLOCKS
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    # The calling kernels' program order.
    tile, column = tile_and_column(section, ahead)
    tile = tl.num_programs(0) - 1 - tile
    kv_head = column // HEAD_TILES
    heads = tl.num_programs(1) // HEAD_TILES * GROUP
    p_k += kv_head.to(tl.int64) * stride_kh
    p_v += kv_head.to(tl.int64) * stride_vh
    p_work_items += tile * 5
    end = tl.load(p_work_items + 6)
    o_n = tl.arange(0, 16)
    o_d = tl.arange(0, BD)
    for first_row in tl.range(0, BLOCKS * 16 * HEADS, REPAIR_ROWS, num_stages=1):
        o_m = first_row + tl.arange(0, REPAIR_ROWS)
        o_block = o_m // (16 * HEADS)
        o_row = o_m // HEADS % 16
        head_of_group = column % HEAD_TILES * HEADS + o_m % HEADS
        rows, m_rows = block_rows(p_blocks, tile * BLOCKS + o_block, o_row, num_blocks)
        m_rows = m_rows & (head_of_group < GROUP)
        head = (kv_head * GROUP + head_of_group).to(tl.int64)
        b_q = load_rows(p_q + head[:, None] * stride_qh, rows, m_rows, o_d, stride_qt, D).to(tl.float32)
        rows = rows.to(tl.int64)
        b_lse = tl.load(p_lse + rows * heads + head, mask=m_rows, other=0.0) * LOG2E
        b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse)
        b_grad = b_q
        b_delta = b_lse
        if BACKWARD:
            b_grad = load_rows(p_grad_out + head[:, None] * stride_gh, rows, m_rows, o_d, stride_gt, D).to(tl.float32)
            b_delta = tl.load(p_delta + rows * heads + head, mask=m_rows, other=0.0)
        b_sum = tl.zeros([REPAIR_ROWS, BD], tl.float32)
        b_hidden = tl.zeros([REPAIR_ROWS, BD], tl.float32)
        for partial_tile in tl.range(tl.load(p_work_items + 1), end, num_stages=1):
            o_key, m_key = partial_tile_rows(p_partial_tiles, partial_tile, end, o_n, TILE_WORDS)
            bits = partial_tile_bits(p_bits, p_partial_tiles, partial_tile, end, o_block, o_row, TILE_WORDS)
            visible = (((bits[:, None] >> o_n[None, :]) & 1) != 0) & m_key[None, :]
            b_k = load_rows(p_k, o_key, m_key, o_d, stride_kt, D)
            b_v = load_rows(p_v, o_key, m_key, o_d, stride_vt, D)
            b_sum, b_hidden = add_keys(
                b_q, b_grad, b_lse, b_delta, b_k, b_v, visible, b_sum, b_hidden, scale, softcap, BACKWARD, SOFTCAP,
                EXACT,
            )  # fmt: skip
        m_rows = m_rows & reached(b_sum, b_hidden)
        if tl.max(m_rows.to(tl.int32)) != 0:
            visible = (o_m >= 0)[:, None] & (o_n >= 0)[None, :]
            first_range, last_range, steps, key, key_end = load_work_item(p_work_items, p_ranges, 16)
            index = first_range
            for _ in tl.range(0, steps, num_stages=1):
                b_k = load_step(p_k, key, o_n, o_d, stride_kt, D, WIDE)
                b_v = load_step(p_v, key, o_n, o_d, stride_vt, D, WIDE)
                b_sum, b_hidden = add_keys(
                    b_q, b_grad, b_lse, b_delta, b_k, b_v, visible, b_sum, b_hidden, scale, softcap, BACKWARD, SOFTCAP,
                    EXACT,
                )  # fmt: skip
                index, key, key_end = next_step(p_ranges, first_range, last_range, index, key, key_end, 16)
            if BACKWARD:
                b_sum *= scale
            at = rows[:, None] * stride_ot + head[:, None] * stride_oh + o_d[None, :]
            tl.store(p_out + at, b_sum.to(p_out.dtype.element_ty), mask=m_rows[:, None] & (o_d < D)[None, :])


@triton.jit
def _add_queries(
    b_k, b_v, b_q, b_grad, b_lse, b_delta, visible, b_dk, b_dk_hidden, b_dv, b_dv_hidden, scale, softcap,
    SOFTCAP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Add 16 query rows of one head to the gradients of keys (before the scale) and values."""
    b_q = b_q.to(tl.float32)[None, :, :]
    b_grad = b_grad.to(tl.float32)[None, :, :]
    b_s, slope = scores(_products(b_k, b_q), scale, softcap, SOFTCAP, EXACT)
    b_p = tl.where(visible, tl.exp2(b_s - (b_lse * LOG2E)[None, :]), 0.0)
    b_ds = b_p * (_products(b_v, b_grad) - b_delta[None, :]) * slope
    b_dk, b_dk_hidden = _add(b_ds, b_q, visible, b_dk, b_dk_hidden)
    b_dv, b_dv_hidden = _add(b_p, b_grad, visible, b_dv, b_dv_hidden)
    return b_dk, b_dk_hidden, b_dv, b_dv_hidden


@triton.jit(noinline=True)
def repair_keys(
    p_q, p_k, p_v, p_grad_out, p_lse, p_delta, p_dk, p_dv, p_partial_sums, p_blocks, p_bits, p_work_items, p_ranges,
    p_partial_tiles, scale, softcap, num_blocks, num_partials, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt,
    stride_vh, stride_gt, stride_gh, stride_dt, stride_dh, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, WIDE: tl.constexpr, SOFTCAP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Rewrite rows of dk and dv of a tile in mixed_attention, or those of its partial."""
    EXACT: tl.constexpr = p_q.dtype.element_ty == tl.float32
    PARTS: tl.constexpr = 64 // BLOCK_M
    # The calling kernel's program order.
    part = tl.program_id(TILES) % PARTS
    kv_head = tl.program_id(1 - TILES).to(tl.int64)
    kv_heads = tl.num_programs(1 - TILES)
    heads = kv_heads * GROUP
    p_work_items += tl.program_id(TILES) // PARTS * 5
    tile = tl.load(p_work_items + 3)
    partial = tl.load(p_work_items + 4)
    first_partial_tile = tl.load(p_work_items + 1)
    end = tl.load(p_work_items + 6)
    o_e = tl.arange(0, 16)
    o_d = tl.arange(0, BD)
    for first_key in tl.range(part * BLOCK_M, (part + 1) * BLOCK_M, REPAIR_ROWS, num_stages=1):
        o_m = first_key + tl.arange(0, REPAIR_ROWS)
        rows, m_rows = block_rows(p_blocks, tile * 4 + o_m // 16, o_m % 16, num_blocks)
        b_k = load_rows(p_k + kv_head * stride_kh, rows, m_rows, o_d, stride_kt, D).to(tl.float32)
        b_v = load_rows(p_v + kv_head * stride_vh, rows, m_rows, o_d, stride_vt, D).to(tl.float32)
        b_dk = tl.zeros([REPAIR_ROWS, BD], tl.float32)
        b_dv = tl.zeros([REPAIR_ROWS, BD], tl.float32)
        b_dk_hidden = tl.zeros([REPAIR_ROWS, BD], tl.float32)
        b_dv_hidden = tl.zeros([REPAIR_ROWS, BD], tl.float32)
        for head in tl.range(kv_head * GROUP, (kv_head + 1) * GROUP, num_stages=1):
            for partial_tile in tl.range(first_partial_tile, end, num_stages=1):
                o_query, m_query = partial_tile_rows(p_partial_tiles, partial_tile, end, o_e, 6)
                visible = attending_rows(p_bits, p_partial_tiles, partial_tile, end, o_m, o_e, 6) & m_query[None, :]
                b_q = load_rows(p_q + head * stride_qh, o_query, m_query, o_d, stride_qt, D)
                b_grad = load_rows(p_grad_out + head * stride_gh, o_query, m_query, o_d, stride_gt, D)
                at = o_query.to(tl.int64) * heads + head
                b_lse = tl.load(p_lse + at, mask=m_query, other=0.0)
                b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse)
                b_delta = tl.load(p_delta + at, mask=m_query, other=0.0)
                b_dk, b_dk_hidden, b_dv, b_dv_hidden = _add_queries(
                    b_k, b_v, b_q, b_grad, b_lse, b_delta, visible, b_dk, b_dk_hidden, b_dv, b_dv_hidden, scale,
                    softcap, SOFTCAP, EXACT,
                )  # fmt: skip
        m_rows = m_rows & (reached(b_dk, b_dk_hidden) | reached(b_dv, b_dv_hidden))
        if tl.max(m_rows.to(tl.int32)) != 0:
            visible = (o_m >= 0)[:, None] & (o_e >= 0)[None, :]
            for head in tl.range(kv_head * GROUP, (kv_head + 1) * GROUP, num_stages=1):
                first_range, last_range, steps, query, query_end = load_work_item(p_work_items, p_ranges, 16)
                index = first_range
                for _ in tl.range(0, steps, num_stages=1):
                    b_q = load_step(p_q + head * stride_qh, query, o_e, o_d, stride_qt, D, WIDE)
                    b_grad = load_step(p_grad_out + head * stride_gh, query, o_e, o_d, stride_gt, D, WIDE)
                    at = (query + o_e).to(tl.int64) * heads + head
                    b_dk, b_dk_hidden, b_dv, b_dv_hidden = _add_queries(
                        b_k, b_v, b_q, b_grad, tl.load(p_lse + at), tl.load(p_delta + at), visible, b_dk, b_dk_hidden,
                        b_dv, b_dv_hidden, scale, softcap, SOFTCAP, EXACT,
                    )  # fmt: skip
                    index, query, query_end = next_step(p_ranges, first_range, last_range, index, query, query_end, 16)
            b_dk *= scale
            mask = m_rows[:, None] & (o_d < D)[None, :]
            if partial >= 0:
                at = ((partial.to(tl.int64) * kv_heads + kv_head) * 64 + o_m)[:, None] * D + o_d[None, :]
                tl.store(p_partial_sums + at, b_dk, mask=mask)
                tl.store(p_partial_sums + num_partials.to(tl.int64) * kv_heads * 64 * D + at, b_dv, mask=mask)
            else:
                at = rows.to(tl.int64)[:, None] * stride_dt + kv_head * stride_dh + o_d[None, :]
                tl.store(p_dk + at, b_dk.to(p_dk.dtype.element_ty), mask=mask)
                tl.store(p_dv + at, b_dv.to(p_dv.dtype.element_ty), mask=mask)
