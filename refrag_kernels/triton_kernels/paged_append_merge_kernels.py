"""The kernels of append_kv (a program per row), and of merge_states and its gradients (a few states per program)."""

import triton
import triton.language as tl

from refrag_kernels.triton_kernels.tiles import LN2, LOG2E


@triton.jit
def append_kv_kernel(
    p_new_k,  # [T, H_kv, D]
    p_new_v,  # [T, H_kv, D]
    p_k,  # [P, page, H_kv, D]
    p_v,  # [P, page, H_kv, D]
    p_table,  # [B, max_pages]
    p_lengths,  # [B]
    p_offsets,  # [B + 1]
    sequences,
    pages,
    max_keys,
    stride_nkt,
    stride_nkh,
    stride_nvt,
    stride_nvh,
    stride_kp,
    stride_ks,
    stride_kh,
    stride_vp,
    stride_vs,
    stride_vh,
    stride_table,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    BH: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    row = tl.program_id(0)
    # The last sequence that starts at or before the row: earlier ones with the same start are empty.
    low = tl.zeros([], tl.int32)
    high = low + sequences
    while low + 1 < high:
        middle = (low + high) // 2
        starts = tl.load(p_offsets + middle) <= row
        low = tl.where(starts, middle, low)
        high = tl.where(starts, high, middle)
    end = tl.load(p_offsets + low + 1)
    position = tl.load(p_lengths + low) - end + row
    if (row >= end) | (position < 0) | (position >= max_keys):
        return
    page = tl.load(p_table + low.to(tl.int64) * stride_table + position // PAGE).to(tl.int64)
    if (page < 0) | (page >= pages):
        return
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    o_d = tl.arange(0, BD)
    mask = (o_h < HEADS)[:, None] & (o_d < D)[None, :]
    o_h = o_h.to(tl.int64)[:, None]
    b_k = tl.load(p_new_k + row.to(tl.int64) * stride_nkt + o_h * stride_nkh + o_d[None, :], mask=mask)
    b_v = tl.load(p_new_v + row.to(tl.int64) * stride_nvt + o_h * stride_nvh + o_d[None, :], mask=mask)
    slot = (position % PAGE).to(tl.int64)
    tl.store(p_k + page * stride_kp + slot * stride_ks + o_h * stride_kh + o_d[None, :], b_k, mask=mask)
    tl.store(p_v + page * stride_vp + slot * stride_vs + o_h * stride_vh + o_d[None, :], b_v, mask=mask)


@triton.jit
def _state(p_out, p_lse, o_state, m_state, o_d, stride_t, stride_h, lse_stride_t, lse_stride_h, HEADS, D: tl.constexpr):
    """Return a state's lse and its output, which is 0 if the state is empty."""
    row = (o_state // HEADS).to(tl.int64)
    head = (o_state % HEADS).to(tl.int64)
    b_lse = tl.load(p_lse + row * lse_stride_t + head * lse_stride_h, mask=m_state, other=float("-inf"))
    m_out = (b_lse != float("-inf"))[:, None] & (o_d < D)[None, :]
    at = row[:, None] * stride_t + head[:, None] * stride_h + o_d[None, :]
    return b_lse, tl.load(p_out + at, mask=m_out, other=0.0).to(tl.float32)


@triton.jit
def _weights(b_lse_a, b_lse_b):
    """Return the merged lse and each state's share of the denominator, 0 for two empty states."""
    max_lse = tl.maximum(b_lse_a, b_lse_b)
    base = tl.where(max_lse == float("-inf"), 0.0, max_lse)
    b_a = tl.exp2((b_lse_a - base) * LOG2E)
    b_b = tl.exp2((b_lse_b - base) * LOG2E)
    total = b_a + b_b
    nonempty = total != 0
    total = tl.where(nonempty, total, 1.0)
    return tl.where(nonempty, base + tl.log2(total) * LN2, float("-inf")), b_a / total, b_b / total


@triton.jit
def merge_states_fwd_kernel(
    p_out_a,  # [T, H, D]
    p_lse_a,  # [T, H] float32
    p_out_b,  # [T, H, D]
    p_lse_b,  # [T, H] float32
    p_out,  # [T, H, D]
    p_lse,  # [T, H] float32
    states,
    heads,
    stride_at,
    stride_ah,
    stride_lat,
    stride_lah,
    stride_bt,
    stride_bh,
    stride_lbt,
    stride_lbh,
    STATES: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    o_state = tl.program_id(0) * STATES + tl.arange(0, STATES)
    m_state = o_state < states
    o_d = tl.arange(0, BD)
    b_lse_a, b_a = _state(
        p_out_a, p_lse_a, o_state, m_state, o_d, stride_at, stride_ah, stride_lat, stride_lah, heads, D
    )
    b_lse_b, b_b = _state(
        p_out_b, p_lse_b, o_state, m_state, o_d, stride_bt, stride_bh, stride_lbt, stride_lbh, heads, D
    )
    b_lse, weight_a, weight_b = _weights(b_lse_a, b_lse_b)
    b_out = weight_a[:, None] * b_a + weight_b[:, None] * b_b
    at = o_state.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_out + at, b_out.to(p_out.dtype.element_ty), mask=m_state[:, None] & (o_d < D)[None, :])
    tl.store(p_lse + o_state, b_lse, mask=m_state)


@triton.jit
def merge_states_bwd_kernel(
    p_grad_out,  # [T, H, D]
    p_grad_lse,  # [T, H] float32, contiguous
    p_out_a,  # [T, H, D]
    p_lse_a,  # [T, H] float32
    p_out_b,  # [T, H, D]
    p_lse_b,  # [T, H] float32
    p_da,  # [T, H, D]
    p_dlse_a,  # [T, H] float32
    p_db,  # [T, H, D]
    p_dlse_b,  # [T, H] float32
    states,
    heads,
    stride_at,
    stride_ah,
    stride_lat,
    stride_lah,
    stride_bt,
    stride_bh,
    stride_lbt,
    stride_lbh,
    STATES: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """With weights a + b = 1: d out / d lse_a = a b (out_a - out_b), d lse / d lse_a = a, and likewise for b."""
    o_state = tl.program_id(0) * STATES + tl.arange(0, STATES)
    m_state = o_state < states
    o_d = tl.arange(0, BD)
    b_lse_a, b_a = _state(
        p_out_a, p_lse_a, o_state, m_state, o_d, stride_at, stride_ah, stride_lat, stride_lah, heads, D
    )
    b_lse_b, b_b = _state(
        p_out_b, p_lse_b, o_state, m_state, o_d, stride_bt, stride_bh, stride_lbt, stride_lbh, heads, D
    )
    _, weight_a, weight_b = _weights(b_lse_a, b_lse_b)
    at = o_state.to(tl.int64)[:, None] * D + o_d[None, :]
    m_out = m_state[:, None] & (o_d < D)[None, :]
    b_grad = tl.load(p_grad_out + at, mask=m_out, other=0.0).to(tl.float32)
    b_grad_lse = tl.load(p_grad_lse + o_state, mask=m_state, other=0.0)
    shift = weight_a * weight_b * tl.sum(b_grad * (b_a - b_b), 1)
    tl.store(p_da + at, (weight_a[:, None] * b_grad).to(p_da.dtype.element_ty), mask=m_out)
    tl.store(p_db + at, (weight_b[:, None] * b_grad).to(p_db.dtype.element_ty), mask=m_out)
    tl.store(p_dlse_a + o_state, weight_a * b_grad_lse + shift, mask=m_state)
    tl.store(p_dlse_b + o_state, weight_b * b_grad_lse - shift, mask=m_state)
