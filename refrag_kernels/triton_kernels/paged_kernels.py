"""The kernels of paged_attention: one split of the keys per program, and the merge of the splits."""

import triton
import triton.language as tl

from refrag_kernels.triton_kernels import nonfinite
from refrag_kernels.triton_kernels.tiles import LN2, LOG2E, scores


@triton.jit
def sequence_of_tile(p_offsets, tile, sequences, ROWS: tl.constexpr):
    """Return the sequence that a tile belongs to.

    The tiles of sequence b start at ``offsets[b] // ROWS + b``, which leaves room for at least as many as its rows
    need. So tiles are numbered without a cumulative sum over sequences, whose lengths only the device knows.
    """
    low = tl.zeros([], tl.int32)
    high = low + sequences
    while low + 1 < high:
        middle = (low + high) // 2
        owns = tl.load(p_offsets + middle) // ROWS + middle <= tile
        low = tl.where(owns, middle, low)
        high = tl.where(owns, high, middle)
    return low


@triton.jit
def first_range(p_ranges, cursor, end, key):
    """Return, for each row, the first of its sorted ranges [cursor, end) that ends after ``key``."""
    low = cursor
    high = end
    while tl.max(high - low) > 0:
        middle = (low + high) // 2
        open = low < high
        before = open & (tl.load(p_ranges + middle.to(tl.int64) * 2 + 1, mask=open, other=0) <= key)
        low = tl.where(before, middle + 1, low)
        high = tl.where(open & ~before, middle, high)
    return low


@triton.jit
def in_ranges(p_ranges, cursor, end, o_key, BLOCK_N: tl.constexpr):
    """Return which of BLOCK_N keys are in each row's ranges, [rows, BLOCK_N], and the cursors for the next step."""
    last = tl.max(o_key) + 1
    found = tl.zeros([cursor.shape[0], BLOCK_N], tl.int32)
    moved = 1
    while moved > 0:
        m_range = cursor < end
        b_start = tl.load(p_ranges + cursor.to(tl.int64) * 2, mask=m_range, other=0x7FFFFFFF)
        b_end = tl.load(p_ranges + cursor.to(tl.int64) * 2 + 1, mask=m_range, other=0)
        inside = (o_key[None, :] >= b_start[:, None]) & (o_key[None, :] < b_end[:, None])
        found |= inside.to(tl.int32)
        # A range that extends beyond this step is needed again in the next one.
        done = (m_range & (b_end <= last)).to(tl.int32)
        cursor += done
        moved = tl.max(done)
    return found != 0, cursor


@triton.jit
def pages_of(p_pages, o_key, m_key, PAGE: tl.constexpr):
    """Return the page of each key, -1 for keys outside ``m_key``."""
    return tl.load(p_pages + o_key // PAGE, mask=m_key, other=-1)


@triton.jit
def _load_keys(
    p_k, p_v, page, o_key, m_key, o_d, stride_kp, stride_ks, stride_vp, stride_vs, PAGE: tl.constexpr, D: tl.constexpr
):
    m_load = m_key[:, None] & (o_d < D)[None, :]
    slot = (o_key % PAGE).to(tl.int64)
    at = page.to(tl.int64)[:, None] * stride_kp + slot[:, None] * stride_ks + o_d[None, :]
    b_k = tl.load(p_k + at, mask=m_load, other=0.0)  # [keys, BD]
    at = page.to(tl.int64)[:, None] * stride_vp + slot[:, None] * stride_vs + o_d[None, :]
    b_v = tl.load(p_v + at, mask=m_load, other=0.0)
    return b_k, b_v


@triton.jit
def _step(
    b_q, b_acc, b_max, b_sum, p_k, p_v, page, o_key, m_key, visible, o_d, pages, stride_kp, stride_ks, stride_vp,
    stride_vs, scale, softcap, PAGE: tl.constexpr, D: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = b_q.dtype == tl.float32
    # Keys of pages that are not in the cache are masked.
    m_key &= (page >= 0) & (page < pages)
    b_k, b_v = _load_keys(
        p_k, p_v, page, o_key, m_key, o_d, stride_kp, stride_ks, stride_vp, stride_vs, PAGE, D
    )  # [BLOCK_N, BD]
    b_s, _ = scores(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), scale, softcap, SOFTCAP, EXACT)
    b_s = tl.where(visible & m_key[None, :], b_s, float("-inf"))
    new_max = tl.maximum(b_max, tl.max(b_s, 1))
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    b_p = tl.exp2(b_s - base[:, None])
    decay = tl.exp2(b_max - base)
    b_sum = b_sum * decay + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * decay[:, None], input_precision=PRECISION)
    return b_acc, new_max, b_sum


@triton.jit(noinline=True)
def repair_rows(
    p_q, p_k, p_v, p_pages, p_indptr, p_ranges, p_out, p_lse, scale, softcap, window_left, first_row, end_row, shift,
    q_rows, begin, end, pages, num_ranges, stride_qt, stride_qh, stride_kp, stride_ks, stride_vp, stride_vs,
    GROUP: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Rewrite rows of a prefill tile over one split of the keys, ``begin`` to ``end``; see ``nonfinite``."""
    EXACT: tl.constexpr = p_q.dtype.element_ty == tl.float32
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    heads = tl.num_programs(1) // HEAD_TILES * GROUP
    o_n = tl.arange(0, 16)
    o_d = tl.arange(0, BD)
    for first in tl.range(0, ROWS * HEADS, nonfinite.REPAIR_ROWS, num_stages=1):
        o_m = first + tl.arange(0, nonfinite.REPAIR_ROWS)
        head_of_group = tl.program_id(1) % HEAD_TILES * HEADS + o_m % HEADS
        head = (tl.program_id(1) // HEAD_TILES).to(tl.int64) * GROUP + head_of_group
        o_row = first_row + o_m // HEADS
        m_row = (o_row >= 0) & (o_row < tl.minimum(end_row, q_rows)) & (head_of_group < GROUP)
        at = (tl.program_id(2).to(tl.int64) * q_rows + o_row) * heads + head
        b_lse = tl.load(p_lse + at, mask=m_row, other=0.0)
        m_row &= b_lse == b_lse  # rows whose lse is NaN have no finite output to restore
        if tl.max(m_row.to(tl.int32)) != 0:
            b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse * LOG2E)
            p_rows = p_q + o_row.to(tl.int64)[:, None] * stride_qt + head[:, None] * stride_qh + o_d[None, :]
            b_q = tl.load(p_rows, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)
            b_sum = tl.zeros([nonfinite.REPAIR_ROWS, BD], tl.float32)
            b_hidden = tl.zeros([nonfinite.REPAIR_ROWS, BD], tl.float32)
            start = begin // 16 * 16
            if p_indptr is not None:
                cursor = tl.maximum(tl.load(p_indptr + o_row, mask=m_row, other=0), 0)
                range_end = tl.minimum(tl.load(p_indptr + o_row + 1, mask=m_row, other=0), num_ranges)
                cursor = first_range(p_ranges, cursor, range_end, start)
            for key in tl.range(start, end, 16, num_stages=1):
                o_key = key + o_n
                m_key = (o_key >= begin) & (o_key < end)
                page = pages_of(p_pages, o_key, m_key, PAGE)
                m_key &= (page >= 0) & (page < pages)
                visible = (o_key[None, :] <= (shift + o_row)[:, None]) & m_row[:, None] & m_key[None, :]
                if window_left >= 0:
                    visible &= o_key[None, :] >= (shift + o_row)[:, None] - window_left
                if p_indptr is not None:
                    inside, cursor = in_ranges(p_ranges, cursor, range_end, o_key, 16)
                    visible &= inside
                b_k, b_v = _load_keys(
                    p_k, p_v, page, o_key, m_key, o_d, stride_kp, stride_ks, stride_vp, stride_vs, PAGE, D
                )
                b_sum, b_hidden = nonfinite.add_keys(
                    b_q, b_q, b_lse, b_lse, b_k, b_v, visible, b_sum, b_hidden, scale, softcap, False, SOFTCAP, EXACT
                )
            m_row &= nonfinite.reached(b_sum, b_hidden)
            p_rows = p_out + at[:, None] * D + o_d[None, :]
            tl.store(p_rows, b_sum.to(p_out.dtype.element_ty), mask=m_row[:, None] & (o_d < D)[None, :])


@triton.jit
def paged_attention_kernel(
    p_q,  # [T_q, H_q, D]
    p_k,  # [P, page, H_kv, D]
    p_v,  # [P, page, H_kv, D]
    p_table,  # [B, max_pages]
    p_lengths,  # [B]
    p_offsets,  # [B + 1], or None: one row per sequence
    p_indptr,  # [T_q + 1], or None: every key
    p_ranges,  # [R, 2]
    p_sinks,  # [H_q] float32, or None
    p_out,  # [splits, T_q, H_q, D]: float32 if there are several splits
    p_lse,  # [splits, T_q, H_q] float32
    scale,
    softcap,
    window_left,
    sequences,
    q_rows,
    pages,
    num_ranges,
    max_keys,  # rows that the page table has room for
    split_keys,  # keys of a split, a multiple of BLOCK_N; 0: divide each tile's keys evenly
    stride_qt,
    stride_qh,
    stride_kp,
    stride_ks,
    stride_kh,
    stride_vp,
    stride_vs,
    stride_vh,
    stride_table,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,  # query rows per tile, each with HEADS heads
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    AHEAD: tl.constexpr,  # whether a step prefetches the page ids of the next one
):
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head = (tl.program_id(1) // HEAD_TILES).to(tl.int64)
    split = tl.program_id(2)
    o_m = tl.arange(0, ROWS * HEADS)
    o_d = tl.arange(0, BD)
    head_of_group = tl.program_id(1) % HEAD_TILES * HEADS + o_m % HEADS
    head = kv_head * GROUP + head_of_group
    heads = tl.num_programs(1) // HEAD_TILES * GROUP

    if p_offsets is None:
        sequence = tl.program_id(0)
        first_row = sequence
        end_row = sequence + 1
        first_tile_row = sequence
    else:
        sequence = sequence_of_tile(p_offsets, tl.program_id(0), sequences, ROWS)
        first_row = tl.load(p_offsets + sequence)
        end_row = tl.load(p_offsets + sequence + 1)
        first_tile_row = first_row + (tl.program_id(0) - first_row // ROWS - sequence) * ROWS
        if first_tile_row >= end_row:
            return
    o_row = first_tile_row + o_m // HEADS
    # Offsets may be invalid: rows outside [0, q_rows) are not written.
    m_row = (o_row >= 0) & (o_row < tl.minimum(end_row, q_rows)) & (head_of_group < GROUP)
    length = tl.minimum(tl.load(p_lengths + sequence), max_keys)
    position = length - end_row + o_row

    # The keys that any row of the tile may attend to, and those of this split.
    end = length - end_row + tl.minimum(first_tile_row + ROWS, end_row)
    begin = 0
    if window_left >= 0:
        begin = tl.maximum(length - end_row + first_tile_row - window_left, 0)
    first = begin // BLOCK_N * BLOCK_N
    if split_keys == 0:
        split_keys = tl.cdiv(end - first, tl.num_programs(2) * BLOCK_N) * BLOCK_N
    else:
        first = 0
    start = first + split * split_keys
    end = tl.minimum(end, start + split_keys)
    begin = tl.maximum(begin, start)
    start = begin // BLOCK_N * BLOCK_N

    p_rows = o_row.to(tl.int64)[:, None] * stride_qt + head[:, None] * stride_qh + o_d[None, :]
    b_q = tl.load(p_q + p_rows, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)  # [BM, BD]
    p_k += kv_head * stride_kh
    p_v += kv_head * stride_vh
    p_pages = p_table + sequence.to(tl.int64) * stride_table

    b_acc = tl.zeros([ROWS * HEADS, BD], tl.float32)
    b_max = tl.full([ROWS * HEADS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS * HEADS], tl.float32)
    if p_indptr is not None:
        cursor = tl.maximum(tl.load(p_indptr + o_row, mask=m_row, other=0), 0)
        range_end = tl.minimum(tl.load(p_indptr + o_row + 1, mask=m_row, other=0), num_ranges)
        cursor = first_range(p_ranges, cursor, range_end, start)
    if AHEAD and p_indptr is None:
        o_key = start + tl.arange(0, BLOCK_N)
        page = pages_of(p_pages, o_key, (o_key >= begin) & (o_key < end), PAGE)
    for key in range(start, end, BLOCK_N):
        o_key = key + tl.arange(0, BLOCK_N)
        # Keys that no row attends to are not read: they may be NaN.
        m_key = (o_key >= begin) & (o_key < end)
        visible = (o_key[None, :] <= position[:, None]) & m_row[:, None]
        if window_left >= 0:
            visible &= o_key[None, :] >= position[:, None] - window_left
        if p_indptr is None:
            if AHEAD:
                next_page = pages_of(p_pages, o_key + BLOCK_N, o_key + BLOCK_N < end, PAGE)
            else:
                page = pages_of(p_pages, o_key, m_key, PAGE)
            b_acc, b_max, b_sum = _step(
                b_q, b_acc, b_max, b_sum, p_k, p_v, page, o_key, m_key, visible, o_d, pages, stride_kp, stride_ks,
                stride_vp, stride_vs, scale, softcap, PAGE, D, SOFTCAP, PRECISION,
            )  # fmt: skip
            if AHEAD:
                page = next_page
        else:
            inside, cursor = in_ranges(p_ranges, cursor, range_end, o_key, BLOCK_N)
            visible &= inside
            # Under a chunk mask most steps are fully masked: these only evaluate the mask and read no keys.
            m_key &= tl.max(visible.to(tl.int32), 0) > 0
            if tl.max(m_key.to(tl.int32)) > 0:
                page = pages_of(p_pages, o_key, m_key, PAGE)
                b_acc, b_max, b_sum = _step(
                    b_q, b_acc, b_max, b_sum, p_k, p_v, page, o_key, m_key, visible, o_d, pages, stride_kp,
                    stride_ks, stride_vp, stride_vs, scale, softcap, PAGE, D, SOFTCAP, PRECISION,
                )  # fmt: skip

    finite = True
    if p_offsets is not None:  # in a decoding step all rows of a tile attend to the same keys
        finite = nonfinite.all_finite(b_acc)
    if p_sinks is not None:
        # The first split carries the sinks.
        b_sink = tl.load(p_sinks + head, mask=m_row & (split == 0), other=float("-inf")) * LOG2E
        new_max = tl.maximum(b_max, b_sink)
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay = tl.exp2(b_max - base)
        b_sum = b_sum * decay + tl.exp2(b_sink - base)
        b_acc *= decay[:, None]
        b_max = new_max
    attends = b_sum != 0
    b_sum = tl.where(attends, b_sum, 1.0)
    b_lse = tl.where(attends, (b_max + tl.log2(b_sum)) * LN2, float("-inf"))
    at = (split.to(tl.int64) * q_rows + o_row) * heads + head
    tl.store(p_lse + at, b_lse, mask=m_row)
    b_out = (b_acc / b_sum[:, None]).to(p_out.dtype.element_ty)
    tl.store(p_out + at[:, None] * D + o_d[None, :], b_out, mask=m_row[:, None] & (o_d < D)[None, :])
    if p_offsets is not None:
        if not finite:
            tl.debug_barrier()  # the repair reads and overwrites out and lse
            repair_rows(
                p_q, p_k, p_v, p_pages, p_indptr, p_ranges, p_out, p_lse, scale, softcap, window_left, first_tile_row,
                end_row, length - end_row, q_rows, begin, end, pages, num_ranges, stride_qt, stride_qh, stride_kp,
                stride_ks, stride_vp, stride_vs, GROUP, HEADS, ROWS, PAGE, D, BD, SOFTCAP,
            )  # fmt: skip


@triton.jit
def paged_attention_merge_kernel(
    p_split_out,  # [splits, T_q, H_q, D] float32
    p_split_lse,  # [splits, T_q, H_q] float32
    p_out,  # [T_q, H_q, D]
    p_lse,  # [T_q, H_q] float32
    states,  # T_q * H_q
    splits,
    BLOCK_SPLITS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """Merge the splits of one row and head, in a fixed order."""
    state = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, BLOCK_SPLITS)
    o_d = tl.arange(0, BD)
    at = o_p.to(tl.int64) * states + state
    b_lse = tl.load(p_split_lse + at, mask=o_p < splits, other=float("-inf"))
    max_lse = tl.max(b_lse, 0)
    base = tl.where(max_lse == float("-inf"), 0.0, max_lse)
    b_scale = tl.exp2((b_lse - base) * LOG2E)
    total = tl.sum(b_scale, 0)
    attends = total != 0
    total = tl.where(attends, total, 1.0)
    m_split = (b_lse != float("-inf"))[:, None] & (o_d < D)[None, :]
    b_split = tl.load(p_split_out + at[:, None] * D + o_d[None, :], mask=m_split, other=0.0)
    b_out = tl.sum(b_split * b_scale[:, None], 0) / total
    tl.store(p_out + state * D + o_d, b_out.to(p_out.dtype.element_ty), mask=o_d < D)
    tl.store(p_lse + state, tl.where(attends, base + tl.log2(total) * LN2, float("-inf")))
