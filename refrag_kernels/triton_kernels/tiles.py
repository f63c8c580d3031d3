"""Device functions shared by the attention kernels: rows of a tile, iteration over a tile list, masks, scores.

A tile holds BLOCKS consecutive blocks of 16 rows for HEADS query heads of one key/value head: row m belongs to block
m // (16 * HEADS), to row m // HEADS % 16 of it, and to head m % HEADS, so heads that are adjacent in memory are
adjacent in the tile. See ``refrag_kernels.tile_lists`` for the lists.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tile_and_column(section, ahead):
    """Return this program's tile and column in a grid of tiles by columns.

    The first ``ahead`` tiles of all columns start first, column by column. The remaining tiles follow, one ``section``
    of columns at a time; see ``refrag_kernels.grid_order``. (1, 0) is the order of the grid itself.
    """
    columns = tl.num_programs(1)
    ahead = tl.minimum(ahead, tl.num_programs(0))
    rest = tl.num_programs(0) - ahead
    index = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    leads = index < ahead * columns
    index = tl.where(leads, index, index - ahead * columns)
    first = tl.where(leads, 0, index // tl.maximum(rest * section, 1) * section)
    width = tl.where(leads, columns, tl.minimum(section, columns - first))
    index -= first * rest
    return index // width + tl.where(leads, 0, ahead), first + index % width


@triton.jit
def block_rows(p_blocks, o_block, o_row, num_blocks):
    """Return the packed rows of rows ``o_row`` in blocks ``o_block``, and which of them exist."""
    m_block = o_block < num_blocks
    first = tl.load(p_blocks + o_block * 4, mask=m_block, other=0)
    count = tl.load(p_blocks + o_block * 4 + 1, mask=m_block, other=0)
    return first + o_row, o_row < count


@triton.jit
def load_work_item(p_work_items, p_ranges, BLOCK_N: tl.constexpr):
    """Return a work item's ranges [first, last), the steps in them, and the first range's start and end."""
    first = tl.load(p_work_items)
    last = tl.load(p_work_items + 5)
    steps = (tl.load(p_work_items + 7) - tl.load(p_work_items + 2)) * (64 // BLOCK_N)
    row = tl.load(p_ranges + first * 2, mask=steps > 0, other=0)
    end = tl.load(p_ranges + first * 2 + 1, mask=steps > 0, other=0)
    return first, last, steps, row, end


@triton.jit
def next_step(p_ranges, first, last, index, row, end, BLOCK_N: tl.constexpr):
    """Advance from the step at ``row``: return the next step's range, row and range end, wrapping around at the last.

    One loop iterates over all ranges of a work item: the ranges of a passage have only two or three steps each, and
    loads overlap matrix products only within one loop.
    """
    row += BLOCK_N
    over = row >= end
    index += over.to(tl.int32)
    index = tl.where(index == last, first, index)
    row = tl.load(p_ranges + index * 2, mask=over, other=row)
    end = tl.load(p_ranges + index * 2 + 1, mask=over, other=end)
    return index, row, end


@triton.jit
def partial_tile_rows(p_partial_tiles, partial_tile, end, o_n, TILE_WORDS: tl.constexpr):
    """Return the rows of consecutive partial tiles from ``partial_tile`` on, 16 each, and which of them exist."""
    o_partial_tile = partial_tile + o_n // 16
    m_partial_tile = o_partial_tile < end
    first = tl.load(p_partial_tiles + o_partial_tile * TILE_WORDS, mask=m_partial_tile, other=0)
    count = tl.load(p_partial_tiles + o_partial_tile * TILE_WORDS + 1, mask=m_partial_tile, other=0)
    return first + o_n % 16, o_n % 16 < count


@triton.jit
def partial_tile_bits(p_bits, p_partial_tiles, o_partial_tile, end, o_block, o_row, TILE_WORDS: tl.constexpr):
    """Return 16 bits: the keys of a partial tile that row ``o_row`` of block ``o_block`` attends to."""
    code = tl.load(p_partial_tiles + o_partial_tile * TILE_WORDS + 2 + o_block, mask=o_partial_tile < end, other=-1)
    word = tl.load(p_bits + code * 8 + o_row // 2, mask=code >= 0, other=0)
    return tl.where(code == -2, 0xFFFF, (word >> (16 * (o_row % 2))) & 0xFFFF)


@triton.jit
def visible_keys(
    p_bits, p_partial_tiles, partial_tile, end, o_block, o_row, o_n, TILE_WORDS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Return which keys each row of a tile of query rows attends to, [rows, BLOCK_N]."""
    low = partial_tile_bits(p_bits, p_partial_tiles, partial_tile, end, o_block, o_row, TILE_WORDS)
    if BLOCK_N > 16:
        low |= partial_tile_bits(p_bits, p_partial_tiles, partial_tile + 1, end, o_block, o_row, TILE_WORDS) << 16
    word = low[:, None]
    if BLOCK_N == 64:
        high = partial_tile_bits(p_bits, p_partial_tiles, partial_tile + 2, end, o_block, o_row, TILE_WORDS)
        high |= partial_tile_bits(p_bits, p_partial_tiles, partial_tile + 3, end, o_block, o_row, TILE_WORDS) << 16
        word = tl.where(o_n[None, :] < 32, word, high[:, None])
    return ((word >> (o_n % 32)[None, :]) & 1) != 0


@triton.jit
def attending_rows(p_bits, p_partial_tiles, partial_tile, end, o_key, o_n, TILE_WORDS: tl.constexpr):
    """Return which query rows attend to each key of a tile of four blocks of keys, [64, rows]."""
    o_partial_tile = partial_tile + o_n // 16
    low = partial_tile_bits(p_bits, p_partial_tiles, o_partial_tile, end, 0, o_n % 16, TILE_WORDS)
    low |= partial_tile_bits(p_bits, p_partial_tiles, o_partial_tile, end, 1, o_n % 16, TILE_WORDS) << 16
    high = partial_tile_bits(p_bits, p_partial_tiles, o_partial_tile, end, 2, o_n % 16, TILE_WORDS)
    high |= partial_tile_bits(p_bits, p_partial_tiles, o_partial_tile, end, 3, o_n % 16, TILE_WORDS) << 16
    word = tl.where(o_key[:, None] < 32, low[None, :], high[None, :])
    return ((word >> (o_key % 32)[:, None]) & 1) != 0


@triton.jit
def load_rows(p, o_row, m_row, o_d, stride, D: tl.constexpr):
    """Load rows ``o_row`` of a matrix, [rows, columns]; columns from D on and rows outside ``m_row`` are 0."""
    p_rows = p + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    return tl.load(p_rows, mask=m_row[:, None] & (o_d[None, :] < D), other=0.0)


@triton.jit
def load_step(p, row, o_n, o_d, stride, D: tl.constexpr, WIDE: tl.constexpr):
    """Load the rows of a matrix from ``row`` on, [rows, columns]; columns from D on are 0.

    Offsets within a step have 32 bits, unless ``WIDE`` (see ``launch.wide``): 64 bits took a third more time.
    """
    if WIDE:
        p_rows = p + (row + o_n).to(tl.int64)[:, None] * stride + o_d[None, :]
    else:
        p_rows = p + row.to(tl.int64) * stride + (o_n[:, None] * stride + o_d[None, :])
    # No mask where D fills the tile.
    if o_d.shape[0] != D:
        return tl.load(p_rows, mask=(o_d[None, :] < D), other=0.0)
    else:
        return tl.load(p_rows)


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """Return tanh(x); with ``EXACT`` the relative error is that of float32 near 0 too."""
    t = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - t) / (1.0 + t)
    far = tl.where(x < 0, -far, far)
    if EXACT:
        # 1 - t cancels near 0. The series' next term, 1382 / 155925 x^10, is below 2^-26 for |x| < 0.25.
        y = x * x
        near = x * (1.0 + y * (-1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0 + y * (62.0 / 2835.0)))))
        return tl.where(y < 0.0625, near, far)
    else:
        return far


@triton.jit
def scores(products, scale, softcap, SOFTCAP: tl.constexpr, EXACT: tl.constexpr):
    """Return the scores in units of log2, and their derivative by scale * product (1 without a softcap)."""
    if SOFTCAP:
        ratio = tanh(products * (scale / softcap), EXACT)
        return ratio * (softcap * LOG2E), 1.0 - ratio * ratio
    else:
        return products * (scale * LOG2E), 1.0


@triton.jit
def fill_rows(
    p_out, first, end, step, o_m, head, m_head, o_d, stride_t, stride_h, HEADS: tl.constexpr, D: tl.constexpr
):
    """Write 0 to rows before ``end``: as many as a tile has at ``first``, ``first + step`` and so on."""
    zeros = tl.zeros([o_m.shape[0], o_d.shape[0]], p_out.dtype.element_ty)
    for start in range(first, end, step):
        o_row = start + o_m // HEADS
        p_rows = p_out + o_row.to(tl.int64)[:, None] * stride_t + head[:, None] * stride_h + o_d[None, :]
        tl.store(p_rows, zeros, mask=((o_row < end) & m_head)[:, None] & (o_d[None, :] < D))
