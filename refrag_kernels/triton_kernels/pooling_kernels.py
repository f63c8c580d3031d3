"""The kernels of pool_chunks and its gradient."""

import triton
import triton.language as tl


@triton.jit
def chunk_of_row(p_offsets, o_row, chunks):
    """Return the chunk of each row, or ``chunks`` for rows beyond the last one."""
    low = tl.zeros_like(o_row)
    high = low + chunks
    while tl.max(high - low) > 0:
        middle = (low + high) // 2
        open = low < high
        before = open & (tl.load(p_offsets + middle + 1, mask=open, other=0) <= o_row)
        low = tl.where(before, middle + 1, low)
        high = tl.where(open & ~before, middle, high)
    return low


@triton.jit
def pool_chunks_fwd_kernel(
    p_hidden,  # [T, d]
    p_offsets,  # [C + 1]
    p_out,  # [C, d]
    rows,
    stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MODE: tl.constexpr,
):
    chunk = tl.program_id(0)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(p_offsets + chunk)
    end = tl.load(p_offsets + chunk + 1)
    # Chunks whose offsets are out of range give a row of zeros.
    good = (start >= 0) & (end <= rows) & (start < end)
    if MODE == "mean":
        b_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for row in range(start, tl.where(good, end, start), BLOCK_M):
            o_row = row + tl.arange(0, BLOCK_M)
            p_rows = p_hidden + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
            b_sum += tl.load(p_rows, mask=(o_row < end)[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)
        b_out = tl.sum(b_sum, 0) / tl.maximum(end - start, 1).to(tl.float32)
    else:
        row = start if MODE == "first" else end - 1
        b_out = tl.load(p_hidden + row.to(tl.int64) * stride + o_d, mask=(o_d < D) & good, other=0.0)
    tl.store(p_out + chunk.to(tl.int64) * D + o_d, b_out.to(p_out.dtype.element_ty), mask=o_d < D)


@triton.jit
def pool_chunks_bwd_kernel(
    p_grad,  # [C, d]
    p_offsets,  # [C + 1]
    p_out,  # [T, d]
    rows,
    chunks,
    stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MODE: tl.constexpr,
):
    o_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    chunk = chunk_of_row(p_offsets, o_row, chunks)
    m_chunk = chunk < chunks
    start = tl.load(p_offsets + chunk, mask=m_chunk, other=0)
    end = tl.load(p_offsets + chunk + 1, mask=m_chunk, other=1)
    if MODE == "first":
        m_chunk &= o_row == start
    elif MODE == "last":
        m_chunk &= o_row == end - 1
    p_rows = p_grad + chunk.to(tl.int64)[:, None] * stride + o_d[None, :]
    b_grad = tl.load(p_rows, mask=m_chunk[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)
    if MODE == "mean":
        b_grad /= tl.maximum(end - start, 1).to(tl.float32)[:, None]
    p_rows = p_out + o_row.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_rows, b_grad.to(p_out.dtype.element_ty), mask=(o_row < rows)[:, None] & (o_d < D)[None, :])
