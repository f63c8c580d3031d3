"""The forward kernel of mixed_attention for sm_90, in Gluon: TMA, wgmma, and warps with roles of their own.

A program stays on its multiprocessor and works through the items that ``attention_hopper.divide`` gave it. An item is a
tile of query rows for some heads of a key/value head, and all keys that the rows see, in steps of ``STEP``. One warp,
the producer, copies query rows, keys and values to shared memory; each of ``WARPGROUPS`` consumers computes 64 rows.
They meet at mbarriers, in pairs: a buffer is ``ready`` once its bytes have arrived, and ``empty`` once all consumers
have read it. Step n uses stage n % STAGES of the buffers; the phase of its barriers, n // STAGES % 2, follows.

Row m of a tile belongs to block m // (16 * HEADS), to row m // HEADS % 16 of it, and to head m % HEADS, as in
``tiles``: a box of 16 rows and HEADS heads, as TMA copies it, is just that.

Ranges of keys are multiples of 64 long, and so is what is copied: a step of 128 takes two pieces of 64, wherever they
lie. If their number is odd, the first step takes one piece twice and masks the second: all others are without a test.
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

PIECE = gl.constexpr(64)  # keys that are copied at a time
ROWS = gl.constexpr(64)  # of a consumer: those of a wgmma
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _item(p_items, index, last):
    """Return tile, head (key/value head and part of its group), first range and pieces of an item; 0 from last on."""
    m_item = index < last
    p_item = p_items + index * 4
    tile = gl.load(p_item, mask=m_item, other=0)
    head = gl.load(p_item + 1, mask=m_item, other=0)
    first_range = gl.load(p_item + 2, mask=m_item, other=0)
    pieces = gl.load(p_item + 3, mask=m_item, other=0)
    return tile, head, first_range, pieces


@gluon.jit
def _next_piece(p_ranges, index, key, end):
    """Return range, first key and end of that range for the piece after the one at ``key``."""
    key += PIECE
    over = key >= end
    index = gl.where(over, index + 1, index)
    key = gl.load(p_ranges + index * 2, mask=over, other=key)
    end = gl.load(p_ranges + index * 2 + 1, mask=over, other=end)
    return index, key, end


@gluon.jit
def _copy_step(desc, head, first, second, empty, ready, buffers, n, STEP: gl.constexpr, STAGES: gl.constexpr):
    """Copy the pieces at ``first`` and ``second`` to the buffer of step n as soon as that is empty."""
    PIECES: gl.constexpr = STEP // PIECE
    stage = n % STAGES
    buffer = buffers.index(stage)
    mbarrier.wait(empty.index(stage), (n // STAGES & 1) ^ 1)
    mbarrier.expect(ready.index(stage), PIECES * desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [head, first, 0], ready.index(stage), buffer.slice(0, PIECE, dim=1))
    if PIECES == 2:
        tma.async_copy_global_to_shared(desc, [head, second, 0], ready.index(stage), buffer.slice(PIECE, PIECE, dim=1))


@gluon.jit
def _copy_queries(
    q_desc, p_blocks, num_blocks, tile, head, q_empty, q_ready, q_bufs, phase,
    GROUP: gl.constexpr, HEADS: gl.constexpr, BLOCKS: gl.constexpr, WARPGROUPS: gl.constexpr,
):  # fmt: skip
    """Copy the query rows of an item. Rows that a block lacks are copied with it, computed, and not stored."""
    PARTS: gl.constexpr = GROUP // HEADS
    OWN: gl.constexpr = BLOCKS // WARPGROUPS  # blocks of a consumer
    first_head = head // PARTS * GROUP + head % PARTS * HEADS
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
    GROUP: gl.constexpr, HEADS: gl.constexpr, BLOCKS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    WARPGROUPS: gl.constexpr,
):  # fmt: skip
    """Copy what the consumers read, as far ahead of them as there are buffers."""
    q_desc, k_desc, v_desc = descriptors
    p_starts, p_items, p_ranges, p_blocks, num_blocks = walk
    q_bufs, k_bufs, v_bufs = buffers
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, _turns = barriers
    PARTS: gl.constexpr = GROUP // HEADS
    PIECES: gl.constexpr = STEP // PIECE
    start = gl.load(p_starts + gl.program_id(0))
    last = gl.load(p_starts + gl.program_id(0) + 1)
    n = 0  # steps of keys copied
    tiles = 0  # items with keys
    v_head = 0
    v_first = 0
    v_second = 0
    tile, head, index, pieces = _item(p_items, start, last)
    for at in range(start, last):
        next_tile, next_head, next_index, next_pieces = _item(p_items, at + 1, last)
        key = gl.load(p_ranges + index * 2, mask=pieces > 0, other=0)
        end = gl.load(p_ranges + index * 2 + 1, mask=pieces > 0, other=0)
        if pieces > 0:
            first = key
            if PIECES == 2:
                if pieces % 2 == 0:
                    index, key, end = _next_piece(p_ranges, index, key, end)
            # In the order in which buffers become empty: keys are read a step before their values, and the query rows
            # of an item up to its last step.
            _copy_step(k_desc, head // PARTS, first, key, k_empty, k_ready, k_bufs, n, STEP, STAGES)
            if n > 0:
                _copy_step(v_desc, v_head, v_first, v_second, v_empty, v_ready, v_bufs, n - 1, STEP, STAGES)
            _copy_queries(
                q_desc, p_blocks, num_blocks, tile, head, q_empty, q_ready, q_bufs, tiles & 1,
                GROUP, HEADS, BLOCKS, WARPGROUPS,
            )  # fmt: skip
            tiles += 1
            n += 1
            v_head, v_first, v_second = head // PARTS, first, key
            for _ in range(1, (pieces + PIECES - 1) // PIECES):
                index, key, end = _next_piece(p_ranges, index, key, end)
                first = key
                if PIECES == 2:
                    index, key, end = _next_piece(p_ranges, index, key, end)
                _copy_step(k_desc, v_head, first, key, k_empty, k_ready, k_bufs, n, STEP, STAGES)
                _copy_step(v_desc, v_head, v_first, v_second, v_empty, v_ready, v_bufs, n - 1, STEP, STAGES)
                v_first, v_second = first, key
                n += 1
        tile, head, index, pieces = next_tile, next_head, next_index, next_pieces
    if n > 0:
        _copy_step(v_desc, v_head, v_first, v_second, v_empty, v_ready, v_bufs, n - 1, STEP, STAGES)


@gluon.jit
def _softmax(scores, row_max, row_sum, factor):
    """Return the weights of a step, the maximum and sum of rows with it, and what the sums so far are scaled by."""
    new_max = gl.maximum(row_max, gl.max(scores, 1))
    base = new_max * factor
    weights = gl.exp2(scores * factor - gl.expand_dims(base, 1))
    decay = gl.exp2(row_max * factor - base)
    return weights, new_max, row_sum * decay + gl.sum(weights, 1), decay


@gluon.jit
def _consumer(
    output, walk, buffers, barriers, scale,
    GROUP: gl.constexpr, HEADS: gl.constexpr, BLOCKS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    WARPGROUPS: gl.constexpr, IN_TURN: gl.constexpr, D: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """Compute the rows from ``64 * CONSUMER`` on of each item's tile.

    ``IN_TURN``: two consumers issue the products of a step one after the other, so that one's run below the other's
    softmax.
    """
    p_out, p_lse, stride_ot, stride_oh, total_heads = output
    p_starts, p_items, p_ranges, p_blocks, num_blocks = walk
    q_bufs, k_bufs, v_bufs = buffers
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, turns = barriers
    PARTS: gl.constexpr = GROUP // HEADS
    OWN: gl.constexpr = BLOCKS // WARPGROUPS
    PIECES: gl.constexpr = STEP // PIECE
    DTYPE: gl.constexpr = p_out.dtype.element_ty
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])  # a row of 256 bytes by 16 threads
    o_m = gl.arange(0, ROWS, gl.SliceLayout(1, STORED))
    o_d = gl.arange(0, D, gl.SliceLayout(0, STORED))
    o_n = gl.arange(0, STEP, gl.SliceLayout(0, SCORES))
    o_block = CONSUMER * OWN + o_m // (16 * HEADS)
    o_row = o_m // HEADS % 16
    factor = scale * LOG2E
    queries = q_bufs.index(CONSUMER).reshape([ROWS, D])
    none = gl.zeros([ROWS, STEP], gl.float32, SCORES)

    start = gl.load(p_starts + gl.program_id(0))
    last = gl.load(p_starts + gl.program_id(0) + 1)
    n = 0  # steps computed
    tiles = 0  # items with keys
    turn = 0  # of this consumer
    tile, head, _range, pieces = _item(p_items, start, last)
    for at in range(start, last):
        # Asked for before they are needed: a load takes as long as part of a step.
        next_tile, next_head, _next_range, next_pieces = _item(p_items, at + 1, last)
        block = tile * BLOCKS + o_block
        first_row = gl.load(p_blocks + block * 4, mask=block < num_blocks, other=0)
        count = gl.load(p_blocks + block * 4 + 1, mask=block < num_blocks, other=0)
        steps = (pieces + PIECES - 1) // PIECES
        sums = gl.zeros([ROWS, D], gl.float32, SUMS)
        row_max = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        row_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
        if steps > 0:
            mbarrier.wait(q_ready.index(CONSUMER), tiles & 1)
            stage = n % STAGES
            mbarrier.wait(k_ready.index(stage), n // STAGES & 1)
            keys = k_bufs.index(stage).reshape([STEP, D]).permute((1, 0))
            scores = warpgroup_mma(queries, keys, none, use_acc=False)
            mbarrier.arrive(k_empty.index(stage), count=1)
            if PIECES == 2:
                seen = gl.expand_dims(o_n < STEP - pieces % 2 * PIECE, 0)
                scores = gl.where(seen, scores, float("-inf"))
            weights, row_max, row_sum, decay = _softmax(scores, row_max, row_sum, factor)
            operand = gl.convert_layout(weights.to(DTYPE), WEIGHTS)
            for _ in range(1, steps):
                # The products of this step's keys and of the values of the one before run side by side, and the latter
                # go on below the softmax.
                stage = (n + 1) % STAGES
                mbarrier.wait(k_ready.index(stage), (n + 1) // STAGES & 1)
                if IN_TURN:
                    mbarrier.wait(turns.index(CONSUMER), (turn & 1) ^ (1 - CONSUMER))
                    turn += 1
                keys = k_bufs.index(stage).reshape([STEP, D]).permute((1, 0))
                pending_scores = warpgroup_mma(queries, keys, none, use_acc=False, is_async=True)
                stage_before = n % STAGES
                mbarrier.wait(v_ready.index(stage_before), n // STAGES & 1)
                values = v_bufs.index(stage_before).reshape([STEP, D])
                pending_sums = warpgroup_mma(operand, values, sums, is_async=True)
                if IN_TURN:
                    mbarrier.arrive(turns.index(1 - CONSUMER), count=1)
                scores = warpgroup_mma_wait(1, deps=(pending_scores,))
                mbarrier.arrive(k_empty.index(stage), count=1)
                weights, row_max, row_sum, decay = _softmax(scores, row_max, row_sum, factor)
                sums = warpgroup_mma_wait(0, deps=(pending_sums,))
                mbarrier.arrive(v_empty.index(stage_before), count=1)
                sums = sums * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, SUMS)), 1)
                operand = gl.convert_layout(weights.to(DTYPE), WEIGHTS)
                n += 1
            mbarrier.arrive(q_empty.index(CONSUMER), count=1)
            stage = n % STAGES
            mbarrier.wait(v_ready.index(stage), n // STAGES & 1)
            sums = warpgroup_mma(operand, v_bufs.index(stage).reshape([STEP, D]), sums)
            mbarrier.arrive(v_empty.index(stage), count=1)
            n += 1
            tiles += 1

        some = row_sum != 0
        divisor = gl.where(some, row_sum, 1.0)
        lse = gl.where(some, (row_max * factor + gl.log2(divisor)) * LN2, float("-inf"))
        out = sums / gl.expand_dims(gl.convert_layout(divisor, gl.SliceLayout(1, SUMS)), 1)
        row = (first_row + o_row).to(gl.int64)
        o_head = (head // PARTS * GROUP + head % PARTS * HEADS + o_m % HEADS).to(gl.int64)
        m_row = o_row < count
        p_rows = p_out + gl.expand_dims(row * stride_ot + o_head * stride_oh, 1) + gl.expand_dims(o_d, 0)
        gl.store(p_rows, gl.convert_layout(out.to(DTYPE), STORED), mask=gl.expand_dims(m_row, 1))
        gl.store(p_lse + row * total_heads + o_head, gl.convert_layout(lse, gl.SliceLayout(1, STORED)), mask=m_row)
        tile, head, pieces = next_tile, next_head, next_pieces


@gluon.jit(do_not_specialize=["num_blocks", "total_heads"])
def mixed_attention_fwd_hopper_kernel(
    q_desc,  # [T_q, H_q, D] by boxes of [16, HEADS, D]
    k_desc,  # [H_kv, T_kv, D] by boxes of [1, 64, D]
    v_desc,
    p_out,  # [T_q, H_q, D]
    p_lse,  # [T_q, H_q] float32
    p_starts,  # [programs + 1]
    p_items,  # [items, 4]: tile, head, first range, pieces of 64 keys
    p_ranges,  # [R, 2]
    p_blocks,  # [NB, 4], of the plan
    num_blocks,
    scale,
    stride_ot,
    stride_oh,
    total_heads,
    GROUP: gl.constexpr,  # query heads of a key/value head
    HEADS: gl.constexpr,  # of those, heads of a tile
    BLOCKS: gl.constexpr,  # of 16 rows, of a tile
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    IN_TURN: gl.constexpr,
    D: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [WARPGROUPS, ROWS // HEADS, HEADS, D], q_desc.layout)
    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, STEP, D], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, STEP, D], v_desc.layout)
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
    fence_async_shared()  # copies must see the barriers as they are now; the start of the other warps is a barrier

    walk = (p_starts, p_items, p_ranges, p_blocks, num_blocks)
    buffers = (q_bufs, k_bufs, v_bufs)
    barriers = (q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, turns)
    output = (p_out, p_lse, stride_ot, stride_oh, total_heads)
    descriptors = (q_desc, k_desc, v_desc)
    # Constants stay constants only where a call names them.
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (
                    _consumer,
                    (output, walk, buffers, barriers, scale, GROUP, HEADS, BLOCKS, STEP, STAGES, 2, IN_TURN, D, 0),
                ),
                (
                    _consumer,
                    (output, walk, buffers, barriers, scale, GROUP, HEADS, BLOCKS, STEP, STAGES, 2, IN_TURN, D, 1),
                ),
                (_producer, (descriptors, walk, buffers, barriers, GROUP, HEADS, BLOCKS, STEP, STAGES, 2)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _consumer,
                    (output, walk, buffers, barriers, scale, GROUP, HEADS, BLOCKS, STEP, STAGES, 1, False, D, 0),
                ),
                (_producer, (descriptors, walk, buffers, barriers, GROUP, HEADS, BLOCKS, STEP, STAGES, 1)),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )
