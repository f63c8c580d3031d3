"""mixed_attention on sm_90 in Gluon: the schedule of persistent programs, and the launch. No backend selects it yet."""

from __future__ import annotations

import heapq
from typing import Any, NamedTuple

import torch
import triton

from refrag_kernels import extension
from refrag_kernels.plan import AttentionPlan
from refrag_kernels.plan_fields import PlanField, PlanSize
from refrag_kernels.triton_kernels import launch

HEAD_DIM = 128  # the only head_dim that is supported
_WGMMA_M = 64  # rows of a consumer
_ITEM_COST = 1  # of an item's prologue and epilogue, in pieces of 64 keys
_PARTIAL_COST = 0.4  # of a partial tile of 16 keys: more than a quarter, for its mask
_VERSIONS = ((3, 6), (3, 7))  # of Triton, whose Gluon the kernel needs
_ALIGNMENT = 16  # bytes, of addresses and strides for TMA


class Config(NamedTuple):
    """Compile-time configuration of the kernel.

    A tile has 64 rows per consumer: 16 rows of each of ``blocks`` blocks, for as many query heads of a key/value head
    as fill the tile.
    """

    block_n: int = 128  # keys per iteration: 64 or 128
    num_stages: int = 2  # blocks of keys, and as many of values, in shared memory
    blocks: int = 4
    warpgroups: int = 2  # consumers: two in a CTA, or one in each of two CTAs
    consumer_registers: int = 232  # per thread, with two consumers; a single one gets what the producer leaves
    producer_registers: int = 40
    masks: bool = False  # whether there may be partial tiles
    in_turn: bool = False  # whether two consumers alternate in issuing matrix products

    @property
    def block_m(self) -> int:
        """Rows of a tile."""
        return _WGMMA_M * self.warpgroups

    @property
    def num_warps(self) -> int:
        """Warps of a CTA: four for each consumer, and for the producer."""
        return 4 * (self.warpgroups + 1)

    @property
    def heads(self) -> int:
        """Query heads of a tile."""
        return self.block_m // (16 * self.blocks)

    @property
    def resident(self) -> int:
        """Resident CTAs per multiprocessor (the occupancy)."""
        return 2 // self.warpgroups

    @property
    def launched_registers(self) -> int:
        """Registers per thread at launch, when all threads have the same number."""
        return 65536 // self.resident // (32 * self.num_warps) // 8 * 8


class Work(NamedTuple):
    """The items of each program, from ``divide``: int32 tensors on one device, and the shapes that they are for."""

    starts: torch.Tensor  # [programs + 1]: first item of each program
    # [items, 6]: tile, key/value head and part of its group, first range, pieces of 64 keys, first partial tile,
    # partial tiles
    items: torch.Tensor
    ranges: torch.Tensor  # [R, 2]: keys [start, end), multiples of 64 long
    partial_tiles: torch.Tensor  # [E, 2 + blocks]: see refrag_kernels.tile_lists
    bits: torch.Tensor  # [P, 8], the plan's partial_bits
    blocks: torch.Tensor  # [NB, 4], the plan's q_blocks
    q_shape: tuple[int, int]  # rows and heads
    kv_shape: tuple[int, int]
    config: Config


def divide(
    plan: AttentionPlan, q_heads: int, kv_heads: int, *, programs: int | None = None, config: Config | None = None
) -> Work:
    """Divide the work of a plan among the programs of the kernel: longest items first, each to the least busy program.

    Synchronizes with the device if the plan is on one: call it once per plan.

    Parameters
    ----------
    plan : AttentionPlan
        Without ``config.masks``, tiles of ``config.blocks`` blocks must attend to whole ranges of 64 keys only, as they
        do if chunks are multiples of 64 rows long and the mask is not causal.
    q_heads, kv_heads : int
        H_q and H_kv.
    programs : int, optional
        Default: as many as can be resident on the plan's device.
    config : Config, optional

    Returns
    -------
    Work

    Raises
    ------
    ValueError
        If the plan needs masks and ``config.masks`` is False, the plan has a capacity, or the heads don't fill tiles.
    """
    config = config or Config()
    if config.block_n not in (64, 128) or config.warpgroups not in (1, 2) or config.num_stages < 2:
        raise ValueError(
            f"config: got {config}, needs block_n of 64 or 128, 1 or 2 warpgroups, and num_stages of 2 or more"
        )
    if config.in_turn and config.warpgroups != 2:
        raise ValueError(f"config: got in_turn for {config.warpgroups} warpgroup, needs 2")
    allowed = [config.warpgroups * blocks for blocks in (1, 2, 4)]
    if config.blocks not in allowed:
        raise ValueError(
            f"config: got {config.blocks} blocks, needs {allowed[0]}, {allowed[1]} or {allowed[2]} for "
            f"{config.warpgroups} warpgroups"
        )
    group = q_heads // kv_heads
    if q_heads % kv_heads or group % config.heads:
        raise ValueError(
            f"q: got {q_heads} heads for {kv_heads} of k, needs a multiple of {config.heads} for each of them"
        )
    host = plan.to("cpu")
    sizes = host.sizes.tolist()
    rows = host.q_row_block.shape[0], host.kv_row_block.shape[0]
    if rows != (sizes[PlanSize.Q_ROWS], sizes[PlanSize.KV_ROWS]):
        raise ValueError(
            f"plan: got one with a capacity of {rows[0]} rows, needs one of the {sizes[PlanSize.Q_ROWS]} rows alone"
        )
    work_items, ranges, partial_tiles = _tile_list(host, config.blocks)
    if partial_tiles.shape[0] and not config.masks:
        raise ValueError(
            f"plan: got {partial_tiles.shape[0]} partial tiles in groups of {config.blocks} blocks, needs none, or "
            "config.masks"
        )
    if programs is None:
        programs = _multiprocessors(plan.device) * config.resident
    starts, items = _items(work_items, kv_heads * (group // config.heads), programs)
    starts, items, ranges, partial_tiles = (tensor.to(plan.device) for tensor in (starts, items, ranges, partial_tiles))
    blocks, shapes = plan.q_blocks[: sizes[PlanSize.Q_BLOCKS]], ((rows[0], q_heads), (rows[1], kv_heads))
    return Work(starts, items, ranges, partial_tiles, plan.partial_bits, blocks, *shapes, config)


def _tile_list(plan: AttentionPlan, group: int) -> list[torch.Tensor]:
    """Return work items, ranges and partial tiles of a plan on the CPU, for groups of ``group`` blocks."""
    built = extension.planner().tile_lists(
        [tensor.data_ptr() for tensor in plan.tensors()[: len(PlanField)]], False, group, False
    )
    shapes = list(zip(built.rows(), (5, 2, 2 + group)))
    sizes = [rows * width for rows, width in shapes]
    buffer = torch.empty(sum(sizes), dtype=torch.int32, device="cpu")
    built.write(buffer.data_ptr(), [0, sizes[0], sizes[0] + sizes[1]], [rows for rows, _ in shapes])
    return [part.view(shape) for part, shape in zip(buffer.split(sizes), shapes)]


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _items(work_items: torch.Tensor, heads: int, programs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``Work.starts`` and ``Work.items``, with one item per work item and head."""
    first_range, first_partial_tile = work_items[:-1, 0].tolist(), work_items[:-1, 1].tolist()
    pieces, partial_tiles = work_items[:, 2].diff().tolist(), work_items[:, 1].diff().tolist()
    # Items of equal cost are ordered by head, so that concurrent programs read the same keys.
    cost = [keys + _PARTIAL_COST * count + _ITEM_COST for keys, count in zip(pieces, partial_tiles)]
    order = sorted((-cost[tile], head, tile) for head in range(heads) for tile in range(len(cost)))
    programs = max(1, min(programs, len(order)))
    of_program: list[list[tuple[int, ...]]] = [[] for _ in range(programs)]
    busy = [(0.0, program) for program in range(programs)]
    for _, head, tile in order:
        work, program = busy[0]
        item = (tile, head, first_range[tile], pieces[tile], first_partial_tile[tile], partial_tiles[tile])
        of_program[program].append(item)
        heapq.heapreplace(busy, (work + cost[tile], program))
    starts = torch.tensor([0, *(len(items) for items in of_program)], dtype=torch.int32, device="cpu")
    starts = starts.cumsum(0, dtype=torch.int32)
    items = torch.tensor([item for items in of_program for item in items], dtype=torch.int32, device="cpu")
    items = items.reshape(len(order), 6)
    return starts, items


def unsupported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> str | None:
    """Return why the kernel does not support these arguments, or None if it does."""
    if reason := unsupported_tensors(q, k, v):
        return reason
    if not scale > 0:
        return f"scale: got {scale}, needs a positive number"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) not in _VERSIONS:
        return f"triton: got {triton.__version__}, needs 3.6 or 3.7"
    if launch.architecture(q.device) != "sm_90":
        return f"device: got {launch.architecture(q.device)}, needs sm_90"
    return None


def unsupported_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Return why the kernel does not support these tensors, or None if it does."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype != torch.bfloat16:
            return f"{name}: got {tensor.dtype}, needs torch.bfloat16"
        if tensor.dim() != 3 or tensor.shape[2] != HEAD_DIM:
            return f"{name}: got shape {list(tensor.shape)}, needs [T, H, {HEAD_DIM}]"
        strides = [stride for stride, size in zip(tensor.stride()[:2], tensor.shape) if size > 1]
        if tensor.stride(2) != 1 or any(stride <= 0 or 2 * stride % _ALIGNMENT for stride in strides):
            return f"{name}: got strides {tensor.stride()}, needs multiples of 8, and 1 for the last"
        if tensor.data_ptr() % _ALIGNMENT:
            return (
                f"{name}: got memory that starts {tensor.data_ptr() % _ALIGNMENT} bytes off, needs {_ALIGNMENT} bytes"
            )
        if tensor.device != q.device:
            return f"{name}: got a tensor on {tensor.device}, needs {q.device} as q"
    if k.shape != v.shape:
        return f"v: got shape {list(v.shape)}, needs {list(k.shape)} as k"
    return None


def hopper_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, work: Work, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention on sm_90; see ``refrag_kernels.mixed_attention``.

    Parameters
    ----------
    q : Tensor [T_q, H_q, 128], bfloat16
        Strides of q, k and v must be multiples of 16 bytes.
    k, v : Tensor [T_kv, H_kv, 128], bfloat16
    work : Work
        From ``divide``.
    scale : float
        Positive.

    Returns
    -------
    out : Tensor [T_q, H_q, 128], bfloat16
    lse : Tensor [T_q, H_q], float32

    Raises
    ------
    ValueError
        If an argument is not supported, Triton is not 3.6 or 3.7, or the device is not sm_90.
    """
    reason = unsupported(q, k, v, scale)
    if reason:
        raise ValueError(reason)
    for name, shape, wanted in (("q", q.shape, work.q_shape), ("k", k.shape, work.kv_shape)):
        if tuple(shape[:2]) != wanted:
            raise ValueError(
                f"{name}: got shape {list(shape)}, needs {[*wanted, HEAD_DIM]}, for which work was divided"
            )
    if work.items.device != q.device:
        raise ValueError(f"work: got tensors on {work.items.device}, needs {q.device} as q")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    if not k.numel():
        return out.zero_(), lse.fill_(float("-inf"))
    kernel, arguments, options = launch_arguments(q, k, v, out, lse, work, scale)
    with launch.on(q.device):
        kernel[(work.starts.shape[0] - 1,)](**arguments, **options)
    return out, lse


def launch_arguments(q, k, v, out, lse, work: Work, scale: float) -> tuple[Any, dict[str, Any], dict[str, int]]:
    """Return the kernel, its arguments by name, and the compiler's options."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from refrag_kernels.triton_kernels.attention_hopper_kernels import PIECE, mixed_attention_fwd_hopper_kernel

    config = work.config
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    k_box, partial_box, q_box = [1, PIECE.value, HEAD_DIM], [1, 16, HEAD_DIM], [16, config.heads, HEAD_DIM]
    masks = work.partial_tiles.shape[0] > 0
    arguments = dict(
        q_desc=TensorDescriptor(q, [*q.shape], _strides(q), q_box, layout),
        k_desc=_by_heads(k, k_box, layout, TensorDescriptor),
        v_desc=_by_heads(v, k_box, layout, TensorDescriptor),
        k_partial_desc=_by_heads(k, partial_box, layout, TensorDescriptor) if masks else None,
        v_partial_desc=_by_heads(v, partial_box, layout, TensorDescriptor) if masks else None,
        p_out=out,
        p_lse=lse,
        p_starts=work.starts,
        p_items=work.items,
        p_ranges=work.ranges,
        p_partial_tiles=work.partial_tiles,
        p_bits=work.bits,
        p_blocks=work.blocks,
        num_blocks=work.blocks.shape[0],
        scale=scale,
        stride_ot=out.stride(0),
        stride_oh=out.stride(1),
        total_heads=q.shape[1],
        GROUP=q.shape[1] // k.shape[1],
        HEADS=config.heads,
        BLOCKS=config.blocks,
        BLOCK_N=config.block_n,
        STAGES=config.num_stages,
        WARPGROUPS=config.warpgroups,
        MASKS=masks,
        IN_TURN=config.in_turn,
        D=HEAD_DIM,
        CONSUMER_REGISTERS=config.consumer_registers,
        PRODUCER_REGISTERS=config.producer_registers,
    )
    return mixed_attention_fwd_hopper_kernel, arguments, dict(num_warps=4, maxnreg=config.launched_registers)


def _strides(tensor: torch.Tensor) -> list[int]:
    """Return the strides of a tensor; for a dimension of size 1, any that TMA accepts."""
    return [stride if size > 1 else HEAD_DIM for stride, size in zip(tensor.stride()[:2], tensor.shape)] + [1]


def _by_heads(tensor: torch.Tensor, box: list[int], layout, descriptor) -> Any:
    """Return a descriptor of a tensor [T, H, D] as [H, T, D]."""
    rows, heads, width = tensor.shape
    row_stride, head_stride, _ = _strides(tensor)
    return descriptor(tensor, [heads, rows, width], [head_stride, row_stride, 1], box, layout)
