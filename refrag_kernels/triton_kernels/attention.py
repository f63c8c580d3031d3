"""mixed_attention on GPUs by Triton, forward and backward, and attention_received."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from refrag_kernels import grid_order
from refrag_kernels.plan_fields import PlanField
from refrag_kernels.tile_lists import TileList, tensors_of
from refrag_kernels.triton_kernels import configs, launch
from refrag_kernels.triton_kernels.attention_backward_kernels import (
    mixed_attention_bwd_dkv_kernel,
    mixed_attention_bwd_dq_kernel,
    mixed_attention_bwd_sum_kernel,
    mixed_attention_delta_kernel,
)
from refrag_kernels.triton_kernels.attention_forward_kernels import mixed_attention_fwd_kernel
from refrag_kernels.triton_kernels.attention_received_kernels import (
    attention_received_fwd_kernel,
    attention_received_sum_kernel,
)

_DELTA_ROWS = 32  # the threads of a warp, for the sum over rows of dsinks
_SUM_ROWS = 16  # of a tile's 64 rows, per program that adds up partials


def _list(plan: Sequence[torch.Tensor], which: TileList) -> Sequence[torch.Tensor]:
    """Return the work items, ranges, partial tiles and partials of a tile list."""
    return tensors_of(plan[len(PlanField) :], which)


class Tiles(NamedTuple):
    """Tile shape of a kernel that has one program per tile of query rows."""

    heads: int  # per tile; they share a key/value head
    blocks: int  # per tile, of 16 rows each
    block_n: int  # keys per iteration
    num_warps: int
    num_stages: int


def tiles_of(
    kernel: str, target: str, plan: Sequence[torch.Tensor], group: int, head_dim: int, element_size: int, softcap: bool
) -> Tiles:
    """Return the tile shape of ``kernel`` ("forward", "dq") for a plan with ``group`` query heads per key/value head.

    Four or more heads fill a tile with the rows of one block, whose keys are exactly those that the plan lists. With
    fewer heads, or a number of heads that would leave a quarter of the tile empty, a tile has the rows of four blocks,
    which share most of their keys. With short KV they don't share them, so each block is a tile, as it is if 64 rows
    don't fit in shared memory.
    """
    heads = min(8, launch.power_of_2(group))
    if 4 * group <= 3 * heads:
        heads = group & -group  # the largest power of 2 that divides it
    if _short_kv(plan):
        config = configs.short_kv(heads, target, head_dim, element_size, softcap)
        return Tiles(config.block_m // 16, 1, config.block_n, config.num_warps, config.num_stages)
    config = configs.attention(kernel, target, head_dim, element_size, softcap)
    blocks = 4 if heads <= 2 and config.block_m >= 64 else 1
    heads = max(1, min(heads, config.block_m // (16 * blocks)))
    # A tile smaller than block_m needs fewer warps, but no fewer than four, which share the matrix units evenly.
    num_warps = min(config.num_warps, max(4, config.num_warps * heads * blocks * 16 // config.block_m))
    return Tiles(heads, blocks, config.block_n, num_warps, config.num_stages)


def _short_kv(plan: Sequence[torch.Tensor]) -> bool:
    """Return whether blocks of 16 rows attend to fewer than 64 keys on average, as in the encoder.

    Four blocks in one tile would then share hardly any keys, and other tiles process 64 keys per iteration. Chunks of
    up to 32 rows that attend to themselves are such a case, wherever they start: a block of 16 rows overlaps two or
    three of them.

    Only the lengths of the lists are used, so nothing is read from the device. Lists have at least 2 rows, so plans of
    a few blocks don't count as short KV, nor do plans under a capacity, whose lists are as long as any batch needs.
    """
    blocks = plan[PlanField.Q_BLOCKS].shape[0]
    _, ranges, partial_tiles = _list(plan, TileList(False, 1))
    return blocks >= 8 and ranges.shape[0] <= 2 and partial_tiles.shape[0] < 4 * blocks


def _query_tiles(kernel, q, k, v, plan: Sequence[torch.Tensor], softcap: float):
    """Return grid, plan tensors, program order, constants and options of a kernel with tiles of query rows."""
    target = launch.architecture(q.device)
    group, block_d = q.shape[1] // k.shape[1], launch.width(q.shape[2])
    tiles = tiles_of(kernel, target, plan, group, block_d, q.element_size(), softcap > 0)
    work_items, ranges, partial_tiles = _list(plan, TileList(False, tiles.blocks))
    grid = (work_items.shape[0] - 1, k.shape[1] * -(-group // tiles.heads))
    constants = dict(
        GROUP=group,
        HEADS=tiles.heads,
        BLOCKS=tiles.blocks,
        BLOCK_N=tiles.block_n,
        D=q.shape[2],
        BD=block_d,
        WIDE=launch.wide(tiles.block_n, k.stride(0), v.stride(0)),
        PRECISION=launch.precision(q.dtype, target),
    )
    options = dict(num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    fields = (plan[field] for field in (PlanField.SIZES, PlanField.Q_BLOCKS, PlanField.PARTIAL_BITS))
    walk = (*fields, work_items, ranges, partial_tiles)
    return grid, walk, grid_order.order_of(k).columns(grid[1], k.shape[1]), constants, options


def mixed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Sequence[torch.Tensor],
    scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``refrag_kernels.mixed_attention``; returns (out, lse)."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    grid, walk, order, constants, options = _query_tiles("forward", q, k, v, plan, softcap)
    with launch.on(q.device):
        mixed_attention_fwd_kernel[grid](
            q, k, v, out, lse, lse if sinks is None else sinks.contiguous(), *walk, scale, softcap, q.shape[0],
            plan[PlanField.Q_BLOCKS].shape[0], *order, *_strides(q, k, v, out), **constants, SINKS=sinks is not None,
            SOFTCAP=softcap > 0, FUSED=scale > 0 and not softcap, **options,
        )  # fmt: skip
    return out, lse


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def mixed_attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: Sequence[torch.Tensor],
    scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k, v and the sinks."""
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if not q.numel():
        dsinks = lse.new_zeros(0) if sinks is None else torch.zeros_like(sinks)
        return dq, dk.zero_(), dv.zero_(), dsinks
    delta, dsinks = _delta(grad_out, grad_lse.contiguous(), out, lse.contiguous(), plan[PlanField.SIZES], sinks)
    inputs = (q, k, v, grad_out, lse.contiguous(), delta)
    with launch.on(q.device):
        grid, walk, order, constants, options = _query_tiles("dq", q, k, v, plan, softcap)
        mixed_attention_bwd_dq_kernel[grid](
            *inputs, dq, *walk, scale, softcap, q.shape[0], plan[PlanField.Q_BLOCKS].shape[0], *order,
            *_strides(q, k, v, grad_out, dq), **constants, SOFTCAP=softcap > 0, **options,
        )  # fmt: skip
        if k.shape[0]:
            _key_gradients(inputs, dk, dv, plan, scale, softcap)
    return dq, dk, dv, dsinks


def _delta(grad_out, grad_lse, out, lse, sizes, sinks) -> tuple[torch.Tensor, torch.Tensor]:
    rows, heads, columns = out.shape
    programs = -(-rows // _DELTA_ROWS)
    delta = torch.empty_like(lse)
    parts = lse.new_empty(programs if sinks is not None else 0, heads)
    with launch.on(out.device):
        mixed_attention_delta_kernel[(programs, heads)](
            grad_out, grad_lse, out, lse, lse if sinks is None else sinks.contiguous(), sizes, delta, parts, rows,
            *_strides(grad_out, out), BLOCK_M=_DELTA_ROWS, D=columns, BD=launch.width(columns), SINKS=sinks is not None,
        )  # fmt: skip
    return delta, parts.new_empty(0) if sinks is None else parts.sum(0)


def _key_gradients(inputs, dk, dv, plan, scale, softcap) -> None:
    q, k, v, grad_out, lse, _ = inputs
    target, block_d, columns = launch.architecture(q.device), launch.width(q.shape[2]), q.shape[2]
    config = configs.attention("dkv", target, block_d, q.element_size(), softcap > 0)
    work_items, ranges, partial_tiles, partials = _list(plan, TileList(True, 4))
    kv_blocks = plan[PlanField.KV_BLOCKS]
    parts, kv_heads, num_partials = 64 // config.block_m, k.shape[1], partials.shape[0]
    sums = lse  # not written: no work item has a partial
    programs = (work_items.shape[0] - 1) * parts
    # Work items have similar costs and read mostly the same rows, so heads need no sections. Grid axes other than the
    # first have at most 65,535 programs.
    heads_first = grid_order.heads_first() and programs < 2**16
    split = num_partials > 2  # a list without partials has two rows
    if split:
        sums = torch.empty(2, num_partials, kv_heads, 64, columns, dtype=torch.float32, device=q.device)
    mixed_attention_bwd_dkv_kernel[(kv_heads, programs) if heads_first else (programs, kv_heads)](
        *inputs, dk, dv, sums, plan[PlanField.SIZES], kv_blocks, plan[PlanField.PARTIAL_BITS], work_items, ranges,
        partial_tiles, scale, softcap, k.shape[0], kv_blocks.shape[0], num_partials, *_strides(q, k, v, grad_out, dk),
        GROUP=q.shape[1] // kv_heads, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, D=columns, BD=block_d,
        WIDE=launch.wide(config.block_n, q.stride(0), grad_out.stride(0)), SOFTCAP=softcap > 0,
        PRECISION=launch.precision(q.dtype, target), TILES=int(heads_first),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if split:
        mixed_attention_bwd_sum_kernel[(num_partials, kv_heads, 64 // _SUM_ROWS)](
            sums, partials, kv_blocks, dk, dv, num_partials, kv_blocks.shape[0], *dk.stride()[:2], BLOCK_M=_SUM_ROWS,
            D=columns, BD=block_d,
        )  # fmt: skip


def attention_received(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    plan: Sequence[torch.Tensor],
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """See ``refrag_kernels.attention_received``."""
    (kv_rows, kv_heads, columns), kv_blocks = k.shape, plan[PlanField.KV_BLOCKS]
    received = torch.empty(kv_rows, kv_heads, dtype=torch.float32, device=k.device)
    if not q.numel() or not kv_rows:
        return received.zero_()
    target, block_d = launch.architecture(q.device), launch.width(columns)
    config = configs.attention("received", target, block_d, q.element_size(), softcap > 0)
    work_items, ranges, partial_tiles, partials = _list(plan, TileList(True, 4))
    programs, num_partials = (work_items.shape[0] - 1) * (64 // config.block_m), partials.shape[0]
    heads_first = grid_order.heads_first() and programs < 2**16  # as for the gradients of keys
    split = num_partials > 2  # a list without partials has two rows
    sums = torch.empty(num_partials, kv_heads, 64, dtype=torch.float32, device=q.device) if split else received
    with launch.on(q.device):
        attention_received_fwd_kernel[(kv_heads, programs) if heads_first else (programs, kv_heads)](
            q, k, lse, received, sums, plan[PlanField.SIZES], kv_blocks, plan[PlanField.PARTIAL_BITS], work_items,
            ranges, partial_tiles, scale, softcap, kv_rows, kv_blocks.shape[0], *_strides(q, k),
            GROUP=q.shape[1] // kv_heads, BLOCK_M=config.block_m, BLOCK_N=config.block_n, D=columns, BD=block_d,
            WIDE=launch.wide(config.block_n, q.stride(0)), SOFTCAP=softcap > 0,
            PRECISION=launch.precision(q.dtype, target), TILES=int(heads_first),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if split:
            attention_received_sum_kernel[(num_partials, kv_heads)](
                sums, partials, kv_blocks, received, num_partials, kv_blocks.shape[0], num_warps=2
            )
    return received
