"""The kernels of the projection: a matrix product that gathers rows, applies an epilogue and scatters rows."""

import triton
import triton.language as tl

from refrag_kernels.triton_kernels.tiles import LOG2E, tanh

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_GELU_CUBIC = tl.constexpr(0.044715)  # of gelu's tanh approximation


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """Return the activation of x."""
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        return 0.5 * x * (1.0 + tanh((x + x * x * x * _GELU_CUBIC) * _SQRT_2_OVER_PI, EXACT))
    elif ACTIVATION == "silu":
        return x / (1.0 + tl.exp2(x * -LOG2E))
    elif ACTIVATION == "relu":
        return tl.maximum(x, 0.0)
    elif ACTIVATION == "tanh":
        return tanh(x, EXACT)
    else:
        return x


@triton.jit
def slope(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """Return the derivative of the activation at x."""
    if ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(x * _SQRT_HALF)) + x * tl.exp2(x * x * (-0.5 * LOG2E)) * _INV_SQRT_2PI
    elif ACTIVATION == "gelu_tanh":
        t = tanh((x + x * x * x * _GELU_CUBIC) * _SQRT_2_OVER_PI, EXACT)
        inner = (1.0 + x * x * (3 * _GELU_CUBIC)) * _SQRT_2_OVER_PI
        return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp2(x * -LOG2E))
        return s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "tanh":
        t = tanh(x, EXACT)
        return 1.0 - t * t
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def linear_kernel(
    p_a,  # [any, K]
    p_b,  # [K, N]
    p_bias,  # [N]
    p_before,  # [M, N] float32: pre-activations, written (KEEP) or read (SLOPE)
    p_out,  # [any, N]
    p_rows,  # [M] int32: the row of `out` that row m is written to
    p_count,  # [1] int32: the number of rows in p_rows
    p_slots,  # [any] int32: for each row of `out`, the row of `a` that it is computed from
    rows,
    columns,
    inner,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,  # write the pre-activations to `before`
    SLOPE: tl.constexpr,  # multiply by the activation's derivative at `before` instead of bias and activation
    LISTED: tl.constexpr,  # gather rows by p_slots and scatter them to p_rows
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute out[m] = epilogue(a[m] b). Programs are grouped: eight tiles of rows share columns of ``b`` in L2."""
    EXACT: tl.constexpr = p_a.dtype.element_ty == tl.float32
    GROUPED: tl.constexpr = 8
    row_tiles = tl.cdiv(rows, BLOCK_M)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    group = tl.program_id(0) // (GROUPED * column_tiles)
    height = tl.minimum(row_tiles - group * GROUPED, GROUPED)
    within = tl.program_id(0) % (GROUPED * column_tiles)
    first_row = (group * GROUPED + within % height) * BLOCK_M
    o_n = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = first_row + tl.arange(0, BLOCK_M)
    o_k = tl.arange(0, BLOCK_K)
    if LISTED:
        rows = tl.load(p_count)
        if first_row >= rows:
            return
    m_m = o_m < rows
    m_n = o_n < columns
    row_out = o_m
    row_a = o_m
    if LISTED:
        row_out = tl.load(p_rows + o_m, mask=m_m, other=0)
        row_a = tl.load(p_slots + row_out, mask=m_m, other=0)

    p_a_tile = p_a + row_a.to(tl.int64)[:, None] * stride_am + o_k.to(tl.int64)[None, :] * stride_ak
    p_b_tile = p_b + o_k.to(tl.int64)[:, None] * stride_bk + o_n.to(tl.int64)[None, :] * stride_bn
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    step = tl.full([], BLOCK_K, tl.int64)
    for start in range(0, inner, BLOCK_K):
        m_k = start + o_k < inner
        b_a = tl.load(p_a_tile, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_b = tl.load(p_b_tile, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_acc = tl.dot(b_a, b_b, b_acc, input_precision=PRECISION)
        p_a_tile += step * stride_ak
        p_b_tile += step * stride_bk

    m_tile = m_m[:, None] & m_n[None, :]
    at = o_m.to(tl.int64)[:, None] * columns + o_n[None, :]
    if SLOPE:
        b_acc *= slope(tl.load(p_before + at, mask=m_tile, other=0.0), ACTIVATION, EXACT)
    else:
        if BIAS:
            b_acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        if KEEP:
            tl.store(p_before + at, b_acc, mask=m_tile)
        b_acc = activate(b_acc, ACTIVATION, EXACT)
    at = row_out.to(tl.int64)[:, None] * columns + o_n[None, :]
    tl.store(p_out + at, b_acc.to(p_out.dtype.element_ty), mask=m_tile)


@triton.jit
def list_slots_kernel(
    p_slots,  # [T] int32
    p_rows,  # [T] int32
    p_count,  # [1] int32
    rows,
    chunks,
    BLOCK: tl.constexpr,
):
    """List the rows that are slots, in order, in one program: a pass over T numbers does not justify two launches."""
    count = tl.zeros([], tl.int32)
    for start in range(0, rows, BLOCK):
        o_row = start + tl.arange(0, BLOCK)
        slot = tl.load(p_slots + o_row, mask=o_row < rows, other=-1)
        listed = ((slot >= 0) & (slot < chunks)).to(tl.int32)
        tl.store(p_rows + count + tl.cumsum(listed, 0) - listed, o_row, mask=listed != 0)
        count += tl.sum(listed)
    tl.store(p_count, count)


@triton.jit
def embed_text_kernel(
    p_ids,  # [T] int64
    p_table,  # [V, d]
    p_slots,  # [T] int32
    p_out,  # [T, d]
    scale,
    vocabulary,
    chunks,
    stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the text rows: the token's row of the table, or 0 if a token or slot is out of range."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(p_slots + row)
    if (slot >= 0) & (slot < chunks):
        return
    token = tl.load(p_ids + row)
    good = (slot < 0) & (token >= 0) & (token < vocabulary)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_row = tl.load(p_table + token * stride + o_d, mask=(o_d < D) & good, other=0.0).to(tl.float32) * scale
    tl.store(p_out + row * D + o_d, b_row.to(p_out.dtype.element_ty), mask=o_d < D)


@triton.jit
def sum_rows_kernel(
    p_grad,  # [T, d]
    p_keys,  # [T], ascending: the row of `out` that each row is added to
    p_order,  # [T] int64: the row of `grad` for each key
    p_out,  # [any, d], zeros
    rows,
    out_rows,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add rows with equal keys, in row order. The program of a key's first row adds all of them."""
    first = tl.program_id(0).to(tl.int64)
    key = tl.load(p_keys + first).to(tl.int64)
    before = tl.load(p_keys + first - 1, mask=first > 0, other=-1).to(tl.int64)
    if (key < 0) | (key >= out_rows) | ((before == key) & (first > 0)):
        return
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    at = first
    same = key
    while same == key:
        row = tl.load(p_order + at)
        b_sum += tl.load(p_grad + row * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)
        at += 1
        same = tl.load(p_keys + at, mask=at < rows, other=-1).to(tl.int64)
    tl.store(p_out + key * D + o_d, (b_sum * scale).to(p_out.dtype.element_ty), mask=o_d < D)
