"""The backward kernels of mixed_attention: delta and the sinks, dq by tiles of query rows, dk and dv by tiles of keys.

Each gradient is written by one program that adds its terms in the order of the plan: no atomics, and the same bits in
every run.
"""

import triton
import triton.language as tl

from refrag_kernels.triton_kernels.tiles import (
    LOG2E,
    block_rows,
    entry_rows,
    fill_rows,
    load_rows,
    scores,
    seeing_rows,
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
    p_dsinks,  # [programs along the rows, H_q] float32
    q_rows,
    stride_gt,
    stride_gh,
    stride_ot,
    stride_oh,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Write delta = dout . out - dlse, 0 beyond the batch, and a program's part of the gradient of its head's sink."""
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BD)
    m_row = o_row < tl.load(p_sizes)
    b_grad = load_rows(p_grad_out + head.to(tl.int64) * stride_gh, o_row, m_row, o_d, stride_gt, D, True)
    b_out = load_rows(p_out + head.to(tl.int64) * stride_oh, o_row, m_row, o_d, stride_ot, D, True)
    at = o_row.to(tl.int64) * heads + head
    b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
    b_delta -= tl.load(p_grad_lse + at, mask=m_row, other=0.0)
    # A row that sees nothing has lse -inf; what is fed into the gradient of that is dropped.
    b_lse = tl.load(p_lse + at, mask=m_row, other=float("-inf"))
    b_delta = tl.where(b_lse == float("-inf"), 0.0, b_delta)
    tl.store(p_delta + at, b_delta, mask=o_row < q_rows)
    if SINKS:
        b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse)
        b_weight = tl.exp2((tl.load(p_sinks + head) - b_lse) * LOG2E)
        tl.store(p_dsinks + tl.program_id(0) * heads + head, -tl.sum(b_weight * b_delta))


@triton.jit
def _dq_step(
    b_q, b_do, b_lse, b_delta, b_dq, p_k, p_v, o_key, m_key, visible, o_d, stride_kt, stride_vt, scale, softcap,
    D: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = b_q.dtype == tl.float32
    b_k = load_rows(p_k, o_key, m_key, o_d, stride_kt, D, MASKED)  # [STEP, BD]
    b_v = load_rows(p_v, o_key, m_key, o_d, stride_vt, D, MASKED)
    b_s, slope = scores(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), scale, softcap, SOFTCAP, EXACT)
    b_p = tl.exp2(b_s - b_lse[:, None])
    if MASKED:
        b_p = tl.where(visible, b_p, 0.0)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[:, None])
    if SOFTCAP:
        b_ds *= slope
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit
def mixed_attention_bwd_dq_kernel(
    p_q,  # [T_q, H_q, D]
    p_k,  # [T_kv, H_kv, D]
    p_v,  # [T_kv, H_kv, D]
    p_grad_out,  # [T_q, H_q, D]
    p_lse,  # [T_q, H_q] float32
    p_delta,  # [T_q, H_q] float32
    p_dq,  # [T_q, H_q, D]
    p_sizes,  # [8], the plan from here on
    p_blocks,  # [NB, 4]
    p_bits,  # [P, 8]
    p_offsets,  # [tiles + 1, 2]
    p_ranges,  # [R, 2]
    p_entries,  # [E, 2 + BLOCKS]
    scale,
    softcap,
    q_rows,
    num_blocks,
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
    STEP: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    WIDTH: tl.constexpr = 2 + BLOCKS
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1) // PARTS
    o_m = tl.arange(0, BLOCKS * 16 * HEADS)
    o_n = tl.arange(0, STEP)
    o_d = tl.arange(0, BD)
    o_block = o_m // (16 * HEADS)
    o_row = o_m // HEADS % 16
    head_of_group = tl.program_id(1) % PARTS * HEADS + o_m % HEADS
    m_head = head_of_group < GROUP
    head = (kv_head * GROUP + head_of_group).to(tl.int64)
    heads = tl.num_programs(1) // PARTS * GROUP

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
    p_k += kv_head.to(tl.int64) * stride_kh
    p_v += kv_head.to(tl.int64) * stride_vh

    b_dq = tl.zeros([BLOCKS * 16 * HEADS, BD], tl.float32)
    for index in range(tl.load(p_offsets + tile * 2), tl.load(p_offsets + tile * 2 + 2)):
        for key in range(tl.load(p_ranges + index * 2), tl.load(p_ranges + index * 2 + 1), STEP):
            b_dq = _dq_step(
                b_q, b_do, b_lse, b_delta, b_dq, p_k, p_v, key + o_n, None, None, o_d, stride_kt, stride_vt, scale,
                softcap, D, SOFTCAP, PRECISION, False,
            )  # fmt: skip
    end = tl.load(p_offsets + tile * 2 + 3)
    for entry in range(tl.load(p_offsets + tile * 2 + 1), end, STEP // 16):
        o_key, m_key = entry_rows(p_entries, entry, end, o_n, WIDTH)
        visible = visible_keys(p_bits, p_entries, entry, end, o_block, o_row, o_n, WIDTH, STEP)
        b_dq = _dq_step(
            b_q, b_do, b_lse, b_delta, b_dq, p_k, p_v, o_key, m_key, visible & m_key[None, :], o_d, stride_kt,
            stride_vt, scale, softcap, D, SOFTCAP, PRECISION, True,
        )  # fmt: skip
    p_rows = p_dq + rows[:, None] * stride_dt + head[:, None] * stride_dh + o_d[None, :]
    tl.store(p_rows, (b_dq * scale).to(p_dq.dtype.element_ty), mask=m_tile)

    ROWS: tl.constexpr = BLOCKS * 16
    first = tl.load(p_sizes) + tile * ROWS
    fill_rows(p_dq, first, q_rows, tl.num_programs(0) * ROWS, o_m, head, m_head, o_d, stride_dt, stride_dh, HEADS, D)


@triton.jit
def _dkv_step(
    b_k, b_v, b_dk, b_dv, p_q, p_grad_out, p_lse, p_delta, o_query, m_query, visible, o_d, stride_qt, stride_gt,
    heads, scale, softcap, D: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add a step of query rows of one head to the gradients of a tile of keys. Scores are transposed, [KEYS, STEP]."""
    EXACT: tl.constexpr = b_k.dtype == tl.float32
    b_q = load_rows(p_q, o_query, m_query, o_d, stride_qt, D, MASKED)  # [STEP, BD]
    b_do = load_rows(p_grad_out, o_query, m_query, o_d, stride_gt, D, MASKED)
    at = o_query.to(tl.int64) * heads
    if MASKED:
        b_lse = tl.load(p_lse + at, mask=m_query, other=0.0)
        b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse)
        b_delta = tl.load(p_delta + at, mask=m_query, other=0.0)
    else:
        b_lse = tl.load(p_lse + at)
        b_delta = tl.load(p_delta + at)
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
    p_sizes,  # [8], the plan from here on
    p_blocks,  # [NK, 4]
    p_bits,  # [P, 8]
    p_offsets,  # [tiles + 1, 2]
    p_ranges,  # [R, 2]
    p_entries,  # [E, 6]
    scale,
    softcap,
    kv_rows,
    num_blocks,
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
    KEYS: tl.constexpr,  # 64 or, where those don't fit in shared memory, a part of them
    STEP: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the keys and values of a tile of four blocks, or of a part of one, over all query heads."""
    WIDTH: tl.constexpr = 6
    PARTS: tl.constexpr = 64 // KEYS
    # Under a causal mask the first tiles are seen by the most rows: they start first, as they are numbered.
    tile = tl.program_id(0) // PARTS
    kv_head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1) * GROUP
    o_m = tl.program_id(0) % PARTS * KEYS + tl.arange(0, KEYS)
    o_n = tl.arange(0, STEP)
    o_d = tl.arange(0, BD)
    rows, m_rows = block_rows(p_blocks, tile * 4 + o_m // 16, o_m % 16, num_blocks)
    b_k = load_rows(p_k + kv_head * stride_kh, rows, m_rows, o_d, stride_kt, D, True)  # [KEYS, BD]
    b_v = load_rows(p_v + kv_head * stride_vh, rows, m_rows, o_d, stride_vt, D, True)
    b_dk = tl.zeros([KEYS, BD], tl.float32)
    b_dv = tl.zeros([KEYS, BD], tl.float32)
    first_range = tl.load(p_offsets + tile * 2)
    first_entry = tl.load(p_offsets + tile * 2 + 1)
    last_range = tl.load(p_offsets + tile * 2 + 2)
    last_entry = tl.load(p_offsets + tile * 2 + 3)
    for head in range(kv_head * GROUP, kv_head * GROUP + GROUP):
        p_q_head = p_q + head * stride_qh
        p_grad_head = p_grad_out + head * stride_gh
        for index in range(first_range, last_range):
            for query in range(tl.load(p_ranges + index * 2), tl.load(p_ranges + index * 2 + 1), STEP):
                b_dk, b_dv = _dkv_step(
                    b_k, b_v, b_dk, b_dv, p_q_head, p_grad_head, p_lse + head, p_delta + head, query + o_n, None, None,
                    o_d, stride_qt, stride_gt, heads, scale, softcap, D, SOFTCAP, PRECISION, False,
                )  # fmt: skip
        for entry in range(first_entry, last_entry, STEP // 16):
            o_query, m_query = entry_rows(p_entries, entry, last_entry, o_n, WIDTH)
            visible = seeing_rows(p_bits, p_entries, entry, last_entry, o_m, o_n, WIDTH)
            b_dk, b_dv = _dkv_step(
                b_k, b_v, b_dk, b_dv, p_q_head, p_grad_head, p_lse + head, p_delta + head, o_query, m_query,
                visible & m_query[None, :], o_d, stride_qt, stride_gt, heads, scale, softcap, D, SOFTCAP, PRECISION,
                True,
            )  # fmt: skip
    at = rows.to(tl.int64)[:, None] * stride_dt + kv_head * stride_dh + o_d[None, :]
    m_tile = m_rows[:, None] & (o_d[None, :] < D)
    tl.store(p_dk + at, (b_dk * scale).to(p_dk.dtype.element_ty), mask=m_tile)
    tl.store(p_dv + at, b_dv.to(p_dv.dtype.element_ty), mask=m_tile)

    first = tl.load(p_sizes + 1) + tile * 64
    step = tl.num_programs(0) // PARTS * 64
    o_head = tl.zeros([KEYS], tl.int64) + kv_head
    fill_rows(p_dk, first, kv_rows, step, o_m, o_head, o_m >= 0, o_d, stride_dt, stride_dh, 1, D)
    fill_rows(p_dv, first, kv_rows, step, o_m, o_head, o_m >= 0, o_d, stride_dt, stride_dh, 1, D)
