"""The forward kernel of mixed_attention for sm_90, in Gluon: persistent and warp-specialized, with TMA and wgmma.

Each program is persistent and computes the items that ``attention_hopper.divide`` assigned to it. An item is a tile of
query rows for some heads of a key/value head, with all keys that the rows attend to, in steps of ``BLOCK_N``. A
producer warp copies query rows, keys and values to shared memory; each of ``WARPGROUPS`` consumers computes 64 rows.
They synchronize by pairs of mbarriers: a buffer is ``ready`` once its bytes have arrived, and ``empty`` once all
consumers have read it. Step n uses stage n % STAGES of the buffers, and n // STAGES % 2 is the phase of its barriers.

Row m of a tile belongs to block m // (16 * HEADS), to row m // HEADS % 16 of it, and to head m % HEADS, as in
``tiles``. A TMA box of 16 rows and HEADS heads has this order already.

Ranges of keys are multiples of 64 long, so keys are copied in pieces of 64: a step of 128 takes two pieces, which need
not be adjacent. If the number of pieces is odd, the first step copies a piece twice and masks the second copy; the
other steps need no mask.

With ``MASKS`` an item begins with steps of partial tiles of 16 keys, whose bits say which row attends to which key. A
key that a row does not attend to has probability 0 but takes part in the matrix product, so NaN in the values of a tile
reaches all rows that attend to any of its keys.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

PIECE = gl.constexpr(64)  # keys per copy
WGMMA_M = gl.constexpr(64)  # rows of a consumer
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _item(p_items, index, last):
    """Load an item: tile, head, first range, pieces, first partial tile, partial tiles; 0 from ``last`` on."""
    m_item = index < last
    p_item = p_items + index * 6
    tile = gl.load(p_item, mask=m_item, other=0)
    head = gl.load(p_item + 1, mask=m_item, other=0)
    first_range = gl.load(p_item + 2, mask=m_item, other=0)
    pieces = gl.load(p_item + 3, mask=m_item, other=0)
    first_partial_tile = gl.load(p_item + 4, mask=m_item, other=0)
    partial_tiles = gl.load(p_item + 5, mask=m_item, other=0)
    return tile, head, first_range, pieces, first_partial_tile, partial_tiles


@gluon.jit
def _masked_steps(partial_tiles, BLOCK_N: gl.constexpr, MASKS: gl.constexpr):
    """Return the number of steps for the partial tiles of an item, which come first."""
    if MASKS:
        return (partial_tiles + BLOCK_N // 16 - 1) // (BLOCK_N // 16)
    else:
        return 0


@gluon.jit
def _next_piece(p_ranges, index, key, end):
    """Advance from the piece at ``key``: return the next piece's range, first key and range end."""
    key += PIECE
    over = key >= end
    index = gl.where(over, index + 1, index)
    key = gl.load(p_ranges + index * 2, mask=over, other=key)
    end = gl.load(p_ranges + index * 2 + 1, mask=over, other=end)
    return index, key, end


@gluon.jit
def _copy_step(
    descriptors, p_partial_tiles, head, masked, first, second, empty, ready, buffers, n,
    TILE_WORDS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the pieces at ``first`` and ``second`` to the buffer of step n as soon as it is empty.

    If ``masked``, copy partial tiles from ``first`` on instead; ``second`` is the end of the item's partial tiles. A
    step with fewer than it has room for repeats the last one, as masked keys and values must be finite too.
    """
    PIECES: gl.constexpr = BLOCK_N // PIECE
    desc, partial_desc = descriptors
    stage = n % STAGES
    bar = ready.index(stage)
    buffer = buffers.index(stage)
    mbarrier.wait(empty.index(stage), (n // STAGES & 1) ^ 1)
    mbarrier.expect(bar, PIECES * desc.block_type.nbytes)
    if masked:
        for own in gl.static_range(BLOCK_N // 16):
            row = gl.load(p_partial_tiles + gl.minimum(first + own, second - 1) * TILE_WORDS)
            tma.async_copy_global_to_shared(partial_desc, [head, row, 0], bar, buffer.slice(own * 16, 16, dim=1))
    else:
        tma.async_copy_global_to_shared(desc, [head, first, 0], bar, buffer.slice(0, PIECE, dim=1))
        if PIECES == 2:
            tma.async_copy_global_to_shared(desc, [head, second, 0], bar, buffer.slice(PIECE, PIECE, dim=1))


@gluon.jit
def _copy_queries(
    q_desc, p_blocks, num_blocks, tile, head, q_empty, q_ready, q_bufs, phase,
    GROUP: gl.constexpr, HEADS: gl.constexpr, BLOCKS: gl.constexpr, WARPGROUPS: gl.constexpr,
):  # fmt: skip
    """Copy the query rows of an item. A block of fewer than 16 rows is copied and computed whole, not stored whole."""
    HEAD_TILES: gl.constexpr = GROUP // HEADS
    OWN: gl.constexpr = BLOCKS // WARPGROUPS  # blocks per consumer
    first_head = head // HEAD_TILES * GROUP + head % HEAD_TILES * HEADS
    for consumer in gl.static_range(WARPGROUPS):
        mbarrier.wait(q_empty.index(consumer), phase ^ 1)
        mbarrier.expect(q_ready.index(consumer), OWN * q_desc.block_type.nbytes)
        for own in gl.static_range(OWN):
            block = tile * BLOCKS + consumer * OWN + own
            row = gl.load(p_blocks + block * 4, mask=block < num_blocks, other=0)
            box = q_bufs.index(consumer).slice(own * 16, 16, dim=0)
            tma.async_copy_global_to_shared(q_desc, [row, first_head, 0], q_ready.index(consumer), box)


@gluon.jit
def _producer(
    descriptors, walk, buffers, barriers,
    GROUP: gl.constexpr, HEADS: gl.constexpr, BLOCKS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    WARPGROUPS: gl.constexpr, MASKS: gl.constexpr,
):  # fmt: skip
    """Copy query rows, keys and values for the consumers, as far ahead as there are buffers."""
    q_desc, k_desc, v_desc, k_partial_desc, v_partial_desc = descriptors
    p_starts, p_items, p_ranges, p_partial_tiles, _p_bits, p_blocks, num_blocks = walk
    q_bufs, k_bufs, v_bufs = buffers
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, _turns = barriers
    k_descs = (k_desc, k_partial_desc)
    v_descs = (v_desc, v_partial_desc)
    HEAD_TILES: gl.constexpr = GROUP // HEADS
    PIECES: gl.constexpr = BLOCK_N // PIECE
    TILE_WORDS: gl.constexpr = 2 + BLOCKS
    start = gl.load(p_starts + gl.program_id(0))
    last = gl.load(p_starts + gl.program_id(0) + 1)
    n = 0  # steps of keys copied
    tiles = 0  # items with keys
    v_head = 0
    v_masked = 0
    v_first = 0
    v_second = 0
    tile, head, index, pieces, partial_tile, partial_tiles = _item(p_items, start, last)
    for at in range(start, last):
        next_tile, next_head, next_index, next_pieces, next_partial_tile, next_partial_tiles = _item(
            p_items, at + 1, last
        )
        key = gl.load(p_ranges + index * 2, mask=pieces > 0, other=0)
        end = gl.load(p_ranges + index * 2 + 1, mask=pieces > 0, other=0)
        masked_steps = _masked_steps(partial_tiles, BLOCK_N, MASKS)
        steps = masked_steps + (pieces + PIECES - 1) // PIECES
        if steps > 0:
            masked = 0 < masked_steps
            first = key
            if PIECES == 2:
                if (pieces % 2 == 0) & (masked_steps == 0):
                    index, key, end = _next_piece(p_ranges, index, key, end)
            second = key
            if MASKS:
                first = gl.where(masked, partial_tile, first)
                second = gl.where(masked, partial_tile + partial_tiles, second)
            # In the order in which buffers become empty: consumers read keys one step before the values, and the query
            # rows of an item until its last step.
            _copy_step(
                k_descs, p_partial_tiles, head // HEAD_TILES, masked if MASKS else False, first, second, k_empty,
                k_ready, k_bufs, n, TILE_WORDS, BLOCK_N, STAGES,
            )  # fmt: skip
            if n > 0:
                _copy_step(
                    v_descs, p_partial_tiles, v_head, v_masked > 0 if MASKS else False, v_first, v_second, v_empty,
                    v_ready, v_bufs, n - 1, TILE_WORDS, BLOCK_N, STAGES,
                )  # fmt: skip
            _copy_queries(
                q_desc, p_blocks, num_blocks, tile, head, q_empty, q_ready, q_bufs, tiles & 1,
                GROUP, HEADS, BLOCKS, WARPGROUPS,
            )  # fmt: skip
            tiles += 1
            n += 1
            v_head, v_first, v_second = head // HEAD_TILES, first, second
            if MASKS:
                v_masked = gl.where(masked, 1, 0)
            for step in range(1, steps):
                masked = step < masked_steps
                if step > masked_steps:
                    index, key, end = _next_piece(p_ranges, index, key, end)
                first = key
                if PIECES == 2:
                    if (step > masked_steps) | ((step == masked_steps) & (pieces % 2 == 0)):
                        index, key, end = _next_piece(p_ranges, index, key, end)
                second = key
                if MASKS:
                    first = gl.where(masked, partial_tile + step * (BLOCK_N // 16), first)
                    second = gl.where(masked, partial_tile + partial_tiles, second)
                _copy_step(
                    k_descs, p_partial_tiles, v_head, masked if MASKS else False, first, second, k_empty, k_ready,
                    k_bufs, n, TILE_WORDS, BLOCK_N, STAGES,
                )  # fmt: skip
                _copy_step(
                    v_descs, p_partial_tiles, v_head, v_masked > 0 if MASKS else False, v_first, v_second, v_empty,
                    v_ready, v_bufs, n - 1, TILE_WORDS, BLOCK_N, STAGES,
                )  # fmt: skip
                v_first, v_second = first, second
                if MASKS:
                    v_masked = gl.where(masked, 1, 0)
                n += 1
        tile, head, index, pieces = next_tile, next_head, next_index, next_pieces
        partial_tile, partial_tiles = next_partial_tile, next_partial_tiles
    if n > 0:
        _copy_step(
            v_descs, p_partial_tiles, v_head, v_masked > 0 if MASKS else False, v_first, v_second, v_empty, v_ready,
            v_bufs, n - 1, TILE_WORDS, BLOCK_N, STAGES,
        )  # fmt: skip


@gluon.jit
def _partial_tile_bits(p_bits, p_partial_tiles, partial_tile, end, o_block, o_row, TILE_WORDS: gl.constexpr):
    """Return 16 bits for each row: the keys of a partial tile that it attends to, by the code of its block."""
    code = gl.load(
        p_partial_tiles + partial_tile * TILE_WORDS + 2 + o_block, mask=(o_block >= 0) & (partial_tile < end), other=-1
    )
    word = gl.load(p_bits + code * 8 + o_row // 2, mask=code >= 0, other=0)
    return gl.where(code == -2, 0xFFFF, (word >> (16 * (o_row % 2))) & 0xFFFF)


@gluon.jit
def _masked(scores, step, masked_steps, pieces, partial_tile, partial_tiles, masks, BLOCK_N: gl.constexpr):
    """Mask the scores of a step of partial tiles, or of the first step after them, with -inf."""
    p_bits, p_partial_tiles, o_block, o_row, o_n, TILE_WORDS = masks
    if step < masked_steps:
        first = partial_tile + step * (BLOCK_N // 16)
        end = partial_tile + partial_tiles
        bits = gl.expand_dims(_partial_tile_bits(p_bits, p_partial_tiles, first, end, o_block, o_row, TILE_WORDS), 1)
        for own in gl.static_range(1, BLOCK_N // 16):
            others = _partial_tile_bits(p_bits, p_partial_tiles, first + own, end, o_block, o_row, TILE_WORDS)
            bits = gl.where(gl.expand_dims(o_n // 16 < own, 0), bits, gl.expand_dims(others, 1))
        scores = gl.where(((bits >> gl.expand_dims(o_n % 16, 0)) & 1) != 0, scores, float("-inf"))
    elif BLOCK_N > PIECE:
        scores = gl.where(gl.expand_dims(o_n < BLOCK_N - pieces % 2 * PIECE, 0), scores, float("-inf"))
    return scores


@gluon.jit
def _softmax(scores, row_max, row_sum, factor, MASKS: gl.constexpr):
    """Return exp(scores - row_max), the updated row_max and row_sum, and the factor that rescales the accumulator."""
    new_max = gl.maximum(row_max, gl.max(scores, 1))
    base = new_max * factor
    if MASKS:  # rows that have not attended to a key yet: -inf - -inf would be NaN
        base = gl.where(new_max == float("-inf"), 0.0, base)
    probs = gl.exp2(scores * factor - gl.expand_dims(base, 1))
    decay = gl.exp2(row_max * factor - base)
    return probs, new_max, row_sum * decay + gl.sum(probs, 1), decay


@gluon.jit
def _consumer(
    output, walk, buffers, barriers, scale,
    GROUP: gl.constexpr, HEADS: gl.constexpr, BLOCKS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    WARPGROUPS: gl.constexpr, MASKS: gl.constexpr, IN_TURN: gl.constexpr, D: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """Compute rows ``64 * CONSUMER`` to ``64 * CONSUMER + 63`` of each item's tile.

    With ``IN_TURN`` two consumers alternate in issuing the matrix products of a step, so that the products of one
    overlap the softmax of the other.
    """
    p_out, p_lse, stride_ot, stride_oh, total_heads = output
    p_starts, p_items, _p_ranges, p_partial_tiles, p_bits, p_blocks, num_blocks = walk
    q_bufs, k_bufs, v_bufs = buffers
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, turns = barriers
    HEAD_TILES: gl.constexpr = GROUP // HEADS
    OWN: gl.constexpr = BLOCKS // WARPGROUPS
    PIECES: gl.constexpr = BLOCK_N // PIECE
    DTYPE: gl.constexpr = p_out.dtype.element_ty
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    PROBS: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])  # 16 threads per row of 256 bytes
    o_m = gl.arange(0, WGMMA_M, gl.SliceLayout(1, STORED))
    o_d = gl.arange(0, D, gl.SliceLayout(0, STORED))
    o_n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
    o_block = CONSUMER * OWN + o_m // (16 * HEADS)
    o_row = o_m // HEADS % 16
    o_m_s = gl.arange(0, WGMMA_M, gl.SliceLayout(1, SCORES))
    o_block_s = CONSUMER * OWN + o_m_s // (16 * HEADS)
    o_row_s = o_m_s // HEADS % 16
    masks = (p_bits, p_partial_tiles, o_block_s, o_row_s, o_n, 2 + BLOCKS)
    factor = scale * LOG2E
    queries = q_bufs.index(CONSUMER).reshape([WGMMA_M, D])
    none = gl.zeros([WGMMA_M, BLOCK_N], gl.float32, SCORES)

    start = gl.load(p_starts + gl.program_id(0))
    last = gl.load(p_starts + gl.program_id(0) + 1)
    n = 0  # steps computed
    tiles = 0  # items with keys
    turn = 0  # turns that this consumer has taken
    tile, head, _range, pieces, partial_tile, partial_tiles = _item(p_items, start, last)
    for at in range(start, last):
        # Prefetch the next item: the latency of a load is a good part of a step.
        next_tile, next_head, _next_range, next_pieces, next_partial_tile, next_partial_tiles = _item(
            p_items, at + 1, last
        )
        block = tile * BLOCKS + o_block
        first_row = gl.load(p_blocks + block * 4, mask=block < num_blocks, other=0)
        count = gl.load(p_blocks + block * 4 + 1, mask=block < num_blocks, other=0)
        masked_steps = _masked_steps(partial_tiles, BLOCK_N, MASKS)
        steps = masked_steps + (pieces + PIECES - 1) // PIECES
        acc = gl.zeros([WGMMA_M, D], gl.float32, ACC)
        row_max = gl.full([WGMMA_M], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        row_sum = gl.zeros([WGMMA_M], gl.float32, gl.SliceLayout(1, SCORES))
        if steps > 0:
            mbarrier.wait(q_ready.index(CONSUMER), tiles & 1)
            stage = n % STAGES
            mbarrier.wait(k_ready.index(stage), n // STAGES & 1)
            keys = k_bufs.index(stage).reshape([BLOCK_N, D]).permute((1, 0))
            scores = warpgroup_mma(queries, keys, none, use_acc=False)
            mbarrier.arrive(k_empty.index(stage), count=1)
            if MASKS:
                scores = _masked(scores, 0, masked_steps, pieces, partial_tile, partial_tiles, masks, BLOCK_N)
            elif PIECES == 2:
                visible = gl.expand_dims(o_n < BLOCK_N - pieces % 2 * PIECE, 0)
                scores = gl.where(visible, scores, float("-inf"))
            probs, row_max, row_sum, decay = _softmax(scores, row_max, row_sum, factor, MASKS)
            operand = gl.convert_layout(probs.to(DTYPE), PROBS)
            for step in range(1, steps):
                # QK^T of this step and PV of the previous step run concurrently, and PV overlaps the softmax.
                stage = (n + 1) % STAGES
                mbarrier.wait(k_ready.index(stage), (n + 1) // STAGES & 1)
                if IN_TURN:
                    mbarrier.wait(turns.index(CONSUMER), (turn & 1) ^ (1 - CONSUMER))
                    turn += 1
                keys = k_bufs.index(stage).reshape([BLOCK_N, D]).permute((1, 0))
                pending_scores = warpgroup_mma(queries, keys, none, use_acc=False, is_async=True)
                stage_before = n % STAGES
                mbarrier.wait(v_ready.index(stage_before), n // STAGES & 1)
                values = v_bufs.index(stage_before).reshape([BLOCK_N, D])
                pending_acc = warpgroup_mma(operand, values, acc, is_async=True)
                if IN_TURN:
                    mbarrier.arrive(turns.index(1 - CONSUMER), count=1)
                scores = warpgroup_mma_wait(1, deps=(pending_scores,))
                mbarrier.arrive(k_empty.index(stage), count=1)
                if MASKS:
                    if step <= masked_steps:
                        scores = _masked(
                            scores, step, masked_steps, pieces, partial_tile, partial_tiles, masks, BLOCK_N
                        )
                probs, row_max, row_sum, decay = _softmax(scores, row_max, row_sum, factor, MASKS)
                # Completed already. The wait compiles to a loop, across which ptxas does not move instructions:
                # otherwise it would place the softmax after the wait for PV, which the softmax has to overlap.
                mbarrier.wait(v_ready.index(stage_before), n // STAGES & 1)
                acc = warpgroup_mma_wait(0, deps=(pending_acc,))
                mbarrier.arrive(v_empty.index(stage_before), count=1)
                acc = acc * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, ACC)), 1)
                operand = gl.convert_layout(probs.to(DTYPE), PROBS)
                n += 1
            mbarrier.arrive(q_empty.index(CONSUMER), count=1)
            stage = n % STAGES
            mbarrier.wait(v_ready.index(stage), n // STAGES & 1)
            acc = warpgroup_mma(operand, v_bufs.index(stage).reshape([BLOCK_N, D]), acc)
            mbarrier.arrive(v_empty.index(stage), count=1)
            n += 1
            tiles += 1

        attends = row_sum != 0  # False for fully masked rows
        divisor = gl.where(attends, row_sum, 1.0)
        lse = gl.where(attends, (row_max * factor + gl.log2(divisor)) * LN2, float("-inf"))
        out = acc / gl.expand_dims(gl.convert_layout(divisor, gl.SliceLayout(1, ACC)), 1)
        row = (first_row + o_row).to(gl.int64)
        o_head = (head // HEAD_TILES * GROUP + head % HEAD_TILES * HEADS + o_m % HEADS).to(gl.int64)
        m_row = o_row < count
        p_rows = p_out + gl.expand_dims(row * stride_ot + o_head * stride_oh, 1) + gl.expand_dims(o_d, 0)
        gl.store(p_rows, gl.convert_layout(out.to(DTYPE), STORED), mask=gl.expand_dims(m_row, 1))
        gl.store(p_lse + row * total_heads + o_head, gl.convert_layout(lse, gl.SliceLayout(1, STORED)), mask=m_row)
        tile, head, pieces, partial_tile, partial_tiles = (
            next_tile,
            next_head,
            next_pieces,
            next_partial_tile,
            next_partial_tiles,
        )


@gluon.jit(do_not_specialize=["num_blocks", "total_heads"])
def mixed_attention_fwd_hopper_kernel(
    q_desc,  # [T_q, H_q, D] in boxes of [16, HEADS, D]
    k_desc,  # [H_kv, T_kv, D] in boxes of [1, 64, D]
    v_desc,
    k_partial_desc,  # with MASKS, the same in boxes of [1, 16, D]
    v_partial_desc,
    p_out,  # [T_q, H_q, D]
    p_lse,  # [T_q, H_q] float32
    p_starts,  # [programs + 1]
    p_items,  # [items, 6]: tile, head, first range, pieces of 64 keys, first partial tile, partial tiles
    p_ranges,  # [R, 2]
    p_partial_tiles,  # [E, TILE_WORDS]
    p_bits,  # [P, 8]
    p_blocks,  # [NB, 4], the plan's q_blocks
    num_blocks,
    scale,
    stride_ot,
    stride_oh,
    total_heads,
    GROUP: gl.constexpr,  # query heads per key/value head
    HEADS: gl.constexpr,  # of those, heads in a tile
    BLOCKS: gl.constexpr,  # of 16 query rows, in a tile
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    MASKS: gl.constexpr,  # whether there are partial tiles
    IN_TURN: gl.constexpr,
    D: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [WARPGROUPS, WGMMA_M // HEADS, HEADS, D], q_desc.layout)
    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, BLOCK_N, D], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, BLOCK_N, D], v_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [WARPGROUPS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [WARPGROUPS, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [WARPGROUPS, 1], mbarrier.MBarrierLayout())
    for consumer in gl.static_range(WARPGROUPS):
        mbarrier.init(turns.index(consumer), count=1)
        mbarrier.init(q_ready.index(consumer), count=1)
        mbarrier.init(q_empty.index(consumer), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=WARPGROUPS)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=WARPGROUPS)
    fence_async_shared()  # make the initialized barriers visible to TMA; starting the other warps is a barrier

    walk = (p_starts, p_items, p_ranges, p_partial_tiles, p_bits, p_blocks, num_blocks)
    buffers = (q_bufs, k_bufs, v_bufs)
    barriers = (q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, turns)
    output = (p_out, p_lse, stride_ot, stride_oh, total_heads)
    descriptors = (q_desc, k_desc, v_desc, k_partial_desc, v_partial_desc)
    # Constants remain constexpr only if the call passes them one by one.
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (
                    _consumer,
                    (
                        output, walk, buffers, barriers, scale,
                        GROUP, HEADS, BLOCKS, BLOCK_N, STAGES, 2, MASKS, IN_TURN, D, 0,
                    ),
                ),
                (
                    _consumer,
                    (
                        output, walk, buffers, barriers, scale,
                        GROUP, HEADS, BLOCKS, BLOCK_N, STAGES, 2, MASKS, IN_TURN, D, 1,
                    ),
                ),
                (_producer, (descriptors, walk, buffers, barriers, GROUP, HEADS, BLOCKS, BLOCK_N, STAGES, 2, MASKS)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    _consumer,
                    (
                        output, walk, buffers, barriers, scale,
                        GROUP, HEADS, BLOCKS, BLOCK_N, STAGES, 1, MASKS, False, D, 0,
                    ),
                ),
                (_producer, (descriptors, walk, buffers, barriers, GROUP, HEADS, BLOCKS, BLOCK_N, STAGES, 1, MASKS)),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )  # fmt: skip
