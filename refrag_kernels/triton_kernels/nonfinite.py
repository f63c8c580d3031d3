"""Sums over the pairs that a mask allows, where some of what is summed is not finite.

Where a row does not see a key its weight is 0; but 0 times a NaN or inf is NaN, and a tile's product takes all keys for
all rows. So kernels look at their sums in the end, which costs a test a tile, and where they are not finite call what
is here: it computes the tile again from the lse, slowly, and writes over it. These are functions of their own, with
nothing but numbers and addresses for arguments, so that the kernels' registers are those of the usual case.
"""

import triton
import triton.language as tl

from refrag_kernels.triton_kernels.tiles import (
    LOG2E,
    block_rows,
    entry_rows,
    load_rows,
    load_step,
    next_step,
    scores,
    seeing_rows,
    tile_and_column,
    unit_of,
    visible_keys,
)


@triton.jit
def spoilt(b_sums):
    """Return whether some of a tile's sums are not finite."""
    finite = (tl.abs(b_sums) < float("inf")).to(tl.int32)
    return tl.min(tl.min(finite, 1), 0) == 0


@triton.jit
def add_seen(b_weights, b_rows, visible, b_acc, PRECISION: tl.constexpr):
    """Return ``b_acc + b_weights @ b_rows`` over visible pairs; NaN where one of them has a row that is not finite."""
    b_wide = b_rows.to(tl.float32)
    finite = tl.abs(b_wide) < float("inf")
    b_finite = tl.where(finite, b_wide, 0.0).to(b_rows.dtype)
    b_spoilt = tl.where(finite, 0.0, 1.0).to(b_rows.dtype)
    b_acc = tl.dot(b_weights.to(b_rows.dtype), b_finite, b_acc, input_precision=PRECISION)
    b_reached = tl.dot(tl.where(visible, 1.0, 0.0).to(b_rows.dtype), b_spoilt, input_precision=PRECISION)
    return tl.where(b_reached > 0, float("nan"), b_acc)


@triton.jit(noinline=True)
def rows_again(
    p_q, p_k, p_v, p_grad, p_lse, p_delta, p_out, p_blocks, p_bits, p_units, p_ranges, p_entries, scale, softcap,
    num_blocks, section, ahead, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_gt, stride_gh,
    stride_ot, stride_oh, BACKWARD: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, BLOCKS: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, WIDE: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the outputs of a tile of query rows, or the gradients of the rows (``BACKWARD``)."""
    WIDTH: tl.constexpr = 2 + BLOCKS
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    # As the kernels that call this number their programs.
    tile, column = tile_and_column(section, ahead)
    tile = tl.num_programs(0) - 1 - tile
    kv_head = column // PARTS
    part = column % PARTS
    heads = tl.num_programs(1) // PARTS * GROUP
    p_k += kv_head.to(tl.int64) * stride_kh
    p_v += kv_head.to(tl.int64) * stride_vh
    p_units += tile * 5
    for sub in tl.range(0, BLOCKS * HEADS, num_stages=1):  # 16 rows at a time take few registers
        o_m = sub * 16 + tl.arange(0, 16)
        o_n = tl.arange(0, 16)
        o_d = tl.arange(0, BD)
        o_block = o_m // (16 * HEADS)
        o_row = o_m // HEADS % 16
        head_of_group = part * HEADS + o_m % HEADS
        head = (kv_head * GROUP + head_of_group).to(tl.int64)
        rows, m_rows = block_rows(p_blocks, tile * BLOCKS + o_block, o_row, num_blocks)
        rows = rows.to(tl.int64)
        m_rows = m_rows & (head_of_group < GROUP)
        m_tile = m_rows[:, None] & (o_d[None, :] < D)
        at = rows[:, None] * stride_qt + head[:, None] * stride_qh + o_d[None, :]
        b_q = tl.load(p_q + at, mask=m_tile, other=0.0)
        EXACT: tl.constexpr = b_q.dtype == tl.float32
        b_lse = tl.load(p_lse + rows * heads + head, mask=m_rows, other=0.0) * LOG2E
        b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse)
        if BACKWARD:
            at = rows[:, None] * stride_gt + head[:, None] * stride_gh + o_d[None, :]
            b_grad = tl.load(p_grad + at, mask=m_tile, other=0.0)
            b_delta = tl.load(p_delta + rows * heads + head, mask=m_rows, other=0.0)
        b_acc = tl.zeros([16, BD], tl.float32)
        first_range, last_range, steps, key, key_end = unit_of(p_units, p_ranges, 16)
        index = first_range
        for _ in tl.range(0, steps, num_stages=1):
            b_k = load_step(p_k, key, o_n, o_d, stride_kt, D, WIDE)
            b_v = load_step(p_v, key, o_n, o_d, stride_vt, D, WIDE)
            b_s, slope = scores(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), scale, softcap, SOFTCAP, EXACT)
            b_p = tl.exp2(b_s - b_lse[:, None])
            if BACKWARD:
                b_ds = b_p * (tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION) - b_delta[:, None]) * slope
                b_acc = tl.dot(b_ds.to(b_k.dtype), b_k, b_acc, input_precision=PRECISION)
            else:
                b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
            index, key, key_end = next_step(p_ranges, first_range, last_range, index, key, key_end, 16)
        end = tl.load(p_units + 6)
        for entry in tl.range(tl.load(p_units + 1), end, num_stages=1):
            o_key, m_key = entry_rows(p_entries, entry, end, o_n, WIDTH)
            visible = visible_keys(p_bits, p_entries, entry, end, o_block, o_row, o_n, WIDTH, 16) & m_key[None, :]
            b_k = load_rows(p_k, o_key, m_key, o_d, stride_kt, D)
            b_v = load_rows(p_v, o_key, m_key, o_d, stride_vt, D)
            b_s, slope = scores(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), scale, softcap, SOFTCAP, EXACT)
            b_p = tl.exp2(b_s - b_lse[:, None])
            if BACKWARD:
                b_ds = b_p * (tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION) - b_delta[:, None]) * slope
                b_acc = add_seen(tl.where(visible, b_ds, 0.0), b_k, visible, b_acc, PRECISION)
            else:
                b_acc = add_seen(tl.where(visible, b_p, 0.0), b_v, visible, b_acc, PRECISION)
        if BACKWARD:
            b_acc *= scale
        at = rows[:, None] * stride_ot + head[:, None] * stride_oh + o_d[None, :]
        tl.store(p_out + at, b_acc.to(p_out.dtype.element_ty), mask=m_tile)


@triton.jit(noinline=True)
def keys_again(
    p_q, p_k, p_v, p_grad, p_lse, p_delta, p_dk, p_dv, p_sums, p_blocks, p_bits, p_units, p_ranges, p_entries, scale,
    softcap, num_blocks, slots, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_gt, stride_gh,
    stride_dt, stride_dh, GROUP: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    WIDE: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a tile of keys and values, or the sums of a part of one to its slot."""
    PARTS: tl.constexpr = 64 // KEYS
    # As the kernel that calls this numbers its programs.
    part = tl.program_id(TILES) % PARTS
    kv_head = tl.program_id(1 - TILES).to(tl.int64)
    kv_heads = tl.num_programs(1 - TILES)
    heads = kv_heads * GROUP
    p_k += kv_head * stride_kh
    p_v += kv_head * stride_vh
    p_units += tl.program_id(TILES) // PARTS * 5
    tile = tl.load(p_units + 3)
    slot = tl.load(p_units + 4)
    for sub in tl.range(0, KEYS // 16, num_stages=1):
        o_m = part * KEYS + sub * 16 + tl.arange(0, 16)
        o_e = tl.arange(0, 16)
        o_d = tl.arange(0, BD)
        rows, m_rows = block_rows(p_blocks, tile * 4 + o_m // 16, o_m % 16, num_blocks)
        b_k = load_rows(p_k, rows, m_rows, o_d, stride_kt, D)
        b_v = load_rows(p_v, rows, m_rows, o_d, stride_vt, D)
        EXACT: tl.constexpr = b_k.dtype == tl.float32
        b_dk = tl.zeros([16, BD], tl.float32)
        b_dv = tl.zeros([16, BD], tl.float32)
        for head in tl.range(kv_head * GROUP, (kv_head + 1) * GROUP, num_stages=1):
            first_range, last_range, steps, query, query_end = unit_of(p_units, p_ranges, 16)
            index = first_range
            for _ in tl.range(0, steps, num_stages=1):
                b_q = load_step(p_q + head * stride_qh, query, o_e, o_d, stride_qt, D, WIDE)
                b_grad = load_step(p_grad + head * stride_gh, query, o_e, o_d, stride_gt, D, WIDE)
                at = (query + o_e).to(tl.int64) * heads + head
                b_s, slope = scores(
                    tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION), scale, softcap, SOFTCAP, EXACT
                )
                b_p = tl.exp2(b_s - (tl.load(p_lse + at) * LOG2E)[None, :])
                b_dv = tl.dot(b_p.to(b_grad.dtype), b_grad, b_dv, input_precision=PRECISION)
                b_dp = tl.dot(b_v, tl.trans(b_grad), input_precision=PRECISION)
                b_ds = b_p * (b_dp - tl.load(p_delta + at)[None, :]) * slope
                b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
                index, query, query_end = next_step(p_ranges, first_range, last_range, index, query, query_end, 16)
            end = tl.load(p_units + 6)
            for entry in tl.range(tl.load(p_units + 1), end, num_stages=1):
                o_query, m_query = entry_rows(p_entries, entry, end, o_e, 6)
                visible = seeing_rows(p_bits, p_entries, entry, end, o_m, o_e, 6) & m_query[None, :]
                b_q = load_rows(p_q + head * stride_qh, o_query, m_query, o_d, stride_qt, D)
                b_grad = load_rows(p_grad + head * stride_gh, o_query, m_query, o_d, stride_gt, D)
                at = o_query.to(tl.int64) * heads + head
                b_lse = tl.load(p_lse + at, mask=m_query, other=0.0)
                b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse)
                b_delta = tl.load(p_delta + at, mask=m_query, other=0.0)
                b_s, slope = scores(
                    tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION), scale, softcap, SOFTCAP, EXACT
                )
                b_p = tl.where(visible, tl.exp2(b_s - (b_lse * LOG2E)[None, :]), 0.0)
                b_dv = add_seen(b_p, b_grad, visible, b_dv, PRECISION)
                b_dp = tl.dot(b_v, tl.trans(b_grad), input_precision=PRECISION)
                b_ds = tl.where(visible, b_p * (b_dp - b_delta[None, :]) * slope, 0.0)
                b_dk = add_seen(b_ds, b_q, visible, b_dk, PRECISION)
        m_d = (o_d < D)[None, :]
        if slot >= 0:
            at = ((slot.to(tl.int64) * kv_heads + kv_head) * 64 + o_m)[:, None] * D + o_d[None, :]
            tl.store(p_sums + at, b_dk * scale, mask=m_d)
            tl.store(p_sums + slots.to(tl.int64) * kv_heads * 64 * D + at, b_dv, mask=m_d)
        else:
            at = rows.to(tl.int64)[:, None] * stride_dt + kv_head * stride_dh + o_d[None, :]
            tl.store(p_dk + at, (b_dk * scale).to(p_dk.dtype.element_ty), mask=m_rows[:, None] & m_d)
            tl.store(p_dv + at, b_dv.to(p_dv.dtype.element_ty), mask=m_rows[:, None] & m_d)
