"""The kernels of select_chunk_rows: the scores of keys, and the selection. One program per chunk and head."""

import triton
import triton.language as tl


@triton.jit
def _load_keys(
    p_k, p_cos, p_sin, o_row, m_row, o_d, stride_kt, stride_cos, stride_sin, D: tl.constexpr, HALF: tl.constexpr
):
    """Load keys in float32 as they were before their rotation; 0 outside ``m_row``."""
    p_rows = p_k + o_row.to(tl.int64)[:, None] * stride_kt
    m_key = m_row[:, None] & (o_d < D)[None, :]
    b_k = tl.load(p_rows + o_d[None, :], mask=m_key, other=0.0).to(tl.float32)
    if HALF > 0:
        # Elements d and d + HALF are a pair.
        o_pair = tl.where(o_d < HALF, o_d + HALF, o_d - HALF)
        o_angle = tl.minimum(o_d, o_pair)[None, :]
        m_key &= (o_d < 2 * HALF)[None, :]
        b_pair = tl.load(p_rows + o_pair[None, :], mask=m_key, other=0.0).to(tl.float32)
        o_row = o_row.to(tl.int64)[:, None]
        b_cos = tl.load(p_cos + o_row * stride_cos + o_angle, mask=m_key, other=1.0)
        b_sin = tl.load(p_sin + o_row * stride_sin + o_angle, mask=m_key, other=0.0)
        b_k = b_k * b_cos + b_pair * tl.where((o_d < HALF)[None, :], b_sin, -b_sin)
    return b_k


@triton.jit
def unlike_mean_kernel(
    p_k,  # [T, H_kv, D]
    p_cos,  # [T, HALF] float32
    p_sin,  # [T, HALF] float32
    p_offsets,  # [C + 1]
    p_scores,  # [T, H_kv] float32
    rows,
    stride_kt,
    stride_kh,
    stride_cos,
    stride_sin,
    D: tl.constexpr,
    BD: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Write minus the cosine between each key and the mean of its chunk's keys. The second pass hits the cache."""
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    start = tl.load(p_offsets + tl.program_id(0))
    end = tl.load(p_offsets + tl.program_id(0) + 1)
    if (start < 0) | (end > rows):
        return
    o_m = tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BD)
    p_k += head.to(tl.int64) * stride_kh
    b_sum = tl.zeros([BLOCK_M, BD], tl.float32)
    for first in range(start, end, BLOCK_M):
        o_row = first + o_m
        b_sum += _load_keys(p_k, p_cos, p_sin, o_row, o_row < end, o_d, stride_kt, stride_cos, stride_sin, D, HALF)
    b_mean = tl.sum(b_sum, 0) / tl.maximum(end - start, 1).to(tl.float32)
    norm = tl.sqrt(tl.sum(b_mean * b_mean, 0))
    for first in range(start, end, BLOCK_M):
        o_row = first + o_m
        b_k = _load_keys(p_k, p_cos, p_sin, o_row, o_row < end, o_d, stride_kt, stride_cos, stride_sin, D, HALF)
        b_norms = tl.sqrt(tl.sum(b_k * b_k, 1)) * norm
        b_dot = tl.sum(b_k * b_mean[None, :], 1)
        b_score = tl.where(b_norms == 0.0, 0.0, -b_dot / tl.where(b_norms == 0.0, 1.0, b_norms))
        tl.store(p_scores + o_row.to(tl.int64) * heads + head, b_score, mask=o_row < end)


@triton.jit
def _load_ranks(p_scores, o_row, m_row, stride_st):
    """Return integers in the order of the scores, that of NaN below all others."""
    b_score = tl.load(p_scores + o_row.to(tl.int64) * stride_st, mask=m_row, other=0.0)
    bits = tl.where(b_score == 0.0, 0.0, b_score).to(tl.int32, bitcast=True)  # -0 and 0 are equal
    return tl.where(m_row & (b_score == b_score), bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x80000000)


@triton.jit
def _fill(p_k_kept, p_v_kept, p_rows, first, end, head, heads, o_m, o_d, D: tl.constexpr):
    """Write 0, and -1 for the row."""
    zeros = tl.zeros([o_m.shape[0], o_d.shape[0]], p_k_kept.dtype.element_ty)
    for row in range(first, end, o_m.shape[0]):
        o_to = (row + o_m).to(tl.int64) * heads + head
        m_to = row + o_m < end
        m_tile = m_to[:, None] & (o_d < D)[None, :]
        tl.store(p_k_kept + o_to[:, None] * D + o_d[None, :], zeros, mask=m_tile)
        tl.store(p_v_kept + o_to[:, None] * D + o_d[None, :], zeros, mask=m_tile)
        tl.store(p_rows + o_to, tl.full([o_m.shape[0]], -1, tl.int32), mask=m_to)


@triton.jit
def select_chunk_rows_fwd_kernel(
    p_k,  # [T, H_kv, D]
    p_v,  # [T, H_kv, D]
    p_offsets,  # [C + 1]
    p_kept_offsets,  # [C + 1]
    p_scores,  # [T, H_kv] float32
    p_k_kept,  # [num_kept, H_kv, D]
    p_v_kept,  # [num_kept, H_kv, D]
    p_rows,  # [num_kept, H_kv]
    rows,
    num_kept,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_st,
    stride_sh,
    D: tl.constexpr,
    BD: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Rank the rows of a chunk and copy the best. Each row that is kept of no valid chunk becomes 0 and -1."""
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    chunks = tl.num_programs(0) - 1
    o_m = tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BD)
    if chunk == chunks:  # rows before those of the first chunk, which only wrong offsets have, and beyond the last
        end = tl.minimum(tl.load(p_kept_offsets), num_kept)
        _fill(p_k_kept, p_v_kept, p_rows, 0, end, head, heads, o_m, o_d, D)
        first = tl.maximum(tl.load(p_kept_offsets + chunks), 0)
        _fill(p_k_kept, p_v_kept, p_rows, first, num_kept, head, heads, o_m, o_d, D)
        return
    start = tl.load(p_offsets + chunk)
    end = tl.load(p_offsets + chunk + 1)
    to = tl.load(p_kept_offsets + chunk)
    to_end = tl.load(p_kept_offsets + chunk + 1)
    count = to_end - to
    good = (start >= 0) & (start < end) & (end <= rows) & (to >= 0) & (to_end <= num_kept) & (count <= end - start)
    if not good:
        to = tl.maximum(to, 0)
        _fill(p_k_kept, p_v_kept, p_rows, to, tl.minimum(to_end, num_kept), head, heads, o_m, o_d, D)
        return
    end_of_ranking = tl.where(count < end - start, end, start)  # nothing to rank if all rows are kept
    p_scores += head.to(tl.int64) * stride_sh
    p_k += head.to(tl.int64) * stride_kh
    p_v += head.to(tl.int64) * stride_vh
    for first in range(start, tl.where(count > 0, end, start), BLOCK_M):
        o_row = first + o_m
        m_row = o_row < end
        b_own = _load_ranks(p_scores, o_row, m_row, stride_st)[:, None]
        b_better = tl.zeros([BLOCK_M], tl.int32)  # rows that are better than each
        for other in range(start, end_of_ranking, BLOCK_M):
            o_other = other + o_m
            b_other = _load_ranks(p_scores, o_other, o_other < end, stride_st)[None, :]
            better = (b_other > b_own) | ((b_other == b_own) & (o_other[None, :] < o_row[:, None]))
            b_better += tl.sum(better.to(tl.int32), 1)
        keep = m_row & (b_better < count)
        o_kept = to + tl.cumsum(keep.to(tl.int32), 0) - 1
        to += tl.sum(keep.to(tl.int32), 0)
        o_to = o_kept.to(tl.int64) * heads + head
        tl.store(p_rows + o_to, o_row, mask=keep)
        m_tile = keep[:, None] & (o_d < D)[None, :]
        o_from = o_row.to(tl.int64)[:, None]
        b_k = tl.load(p_k + o_from * stride_kt + o_d[None, :], mask=m_tile)
        b_v = tl.load(p_v + o_from * stride_vt + o_d[None, :], mask=m_tile)
        tl.store(p_k_kept + o_to[:, None] * D + o_d[None, :], b_k, mask=m_tile)
        tl.store(p_v_kept + o_to[:, None] * D + o_d[None, :], b_v, mask=m_tile)
