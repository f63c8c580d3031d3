"""paged_attention, append_kv and merge_states on GPUs by Triton.

A bad index counts as a key that no row attends to, or as a row to drop; REFRAG_KERNELS_CHECK=1 raises instead.
"""

from __future__ import annotations

import torch
import triton

from refrag_kernels.triton_kernels import configs, decode, launch
from refrag_kernels.triton_kernels.paged_append_merge_kernels import (
    append_kv_kernel,
    merge_states_bwd_kernel,
    merge_states_fwd_kernel,
)
from refrag_kernels.triton_kernels.paged_kernels import paged_attention_kernel, paged_attention_merge_kernel

# Programs that fill 132 multiprocessors (H100) twice: keys are split until there are as many. A constant rather than
# the device's own number, so that results don't depend on the device.
_PROGRAMS = 264
# A split shorter than this costs more to merge than it saves; more splits than that don't fit one merge.
_MIN_SPLIT_KEYS, _MAX_SPLITS = 256, 32
_STATES = 4  # per program of merge_states: rows of a few hundred bytes


def splits_of(programs: int, max_keys: int, step: int) -> tuple[int, int]:
    """Return the number of splits, and the keys per split of a sequence of ``max_keys``, from shapes alone."""
    splits = min(_MAX_SPLITS, -(-_PROGRAMS // programs), -(-max_keys // _MIN_SPLIT_KEYS))
    keys = -(-max_keys // (max(1, splits) * step)) * step
    return max(1, -(-max_keys // max(1, keys))), max(step, keys)


def paged_attention(
    q, k_pages, v_pages, page_table, kv_lengths, q_offsets, visible_indptr, visible_ranges,
    scale, softcap, window_left, window_right, sinks,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """See ``refrag_kernels.paged_attention``; the bound to the right is ignored, as causality is stricter."""
    q_rows, q_heads, columns = q.shape
    num_pages, page, kv_heads, _ = k_pages.shape
    sequences, max_pages = page_table.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    if not sequences:  # rows that belong to no sequence
        return out.zero_(), lse.fill_(float("-inf"))
    target, width, group = launch.architecture(q.device), launch.width(columns), q_heads // kv_heads
    many = 2 * sequences * kv_heads * -(-group // 16) >= _PROGRAMS  # before splitting keys
    config = configs.paged(target, width, q.element_size(), q_offsets is None, many)
    ahead = False
    if q_offsets is None:
        ahead = decode.chosen.ahead and visible_indptr is None
        config = config._replace(num_stages=decode.chosen.num_stages or config.num_stages)
    heads = min(16, launch.power_of_2(group))
    rows = 1 if q_offsets is None else config.block_m // heads
    heads = max(heads, 16 // rows)  # matrix instructions take 16 rows
    tiles = sequences if q_offsets is None else q_rows // rows + sequences
    head_tiles = kv_heads * -(-group // heads)
    splits, split_keys = splits_of(tiles * head_tiles, max_pages * page, config.block_n)
    split_out, split_lse = out, lse
    if splits > 1:
        # Rows that belong to no sequence (beyond q_offsets) keep these values, as fully masked rows.
        split_out = torch.empty((splits, *q.shape), dtype=torch.float32, device=q.device)
        split_lse = torch.empty((splits, *lse.shape), dtype=torch.float32, device=q.device)
    if q_offsets is not None:
        split_out.zero_()
        split_lse.fill_(float("-inf"))
    if visible_ranges is not None and not visible_ranges.shape[0]:
        visible_ranges = visible_ranges.new_zeros(1, 2)
    with launch.on(q.device):
        paged_attention_kernel[(tiles, head_tiles, splits)](
            q, k_pages, v_pages, page_table, kv_lengths, q_offsets, visible_indptr,
            None if visible_ranges is None else visible_ranges.contiguous(), sinks, split_out, split_lse, scale,
            softcap, window_left, sequences, q_rows, num_pages,
            0 if visible_ranges is None else visible_ranges.shape[0],
            max_pages * page, 0 if decode.chosen.by_length else split_keys, *q.stride()[:2], *k_pages.stride()[:3],
            *v_pages.stride()[:3], page_table.stride(0), GROUP=group, HEADS=heads, ROWS=rows, BLOCK_N=config.block_n,
            PAGE=page, D=columns, BD=width, SOFTCAP=softcap > 0, PRECISION=launch.precision(q.dtype, target),
            AHEAD=ahead, **config.options(),
        )  # fmt: skip
        if splits > 1:
            paged_attention_merge_kernel[(q_rows * q_heads,)](
                split_out, split_lse, out, lse, q_rows * q_heads, splits, BLOCK_SPLITS=launch.power_of_2(splits),
                D=columns, BD=width,
            )  # fmt: skip
    return out, lse


def append_kv(k, v, k_pages, v_pages, page_table, kv_lengths, q_offsets) -> None:
    """See ``refrag_kernels.append_kv``. A row whose page is not in the cache is dropped."""
    rows, heads, columns = k.shape
    if not k.numel() or not page_table.numel():
        return
    num_pages, page, _, _ = k_pages.shape
    width = launch.width(columns)
    block = min(launch.power_of_2(heads), max(1, 2048 // width))
    with launch.on(k.device):
        append_kv_kernel[(rows, triton.cdiv(heads, block))](
            k, v, k_pages, v_pages, page_table, kv_lengths, q_offsets, page_table.shape[0], num_pages,
            page_table.shape[1] * page, *k.stride()[:2], *v.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3],
            page_table.stride(0), PAGE=page, HEADS=heads, BH=block, D=columns, BD=width,
        )  # fmt: skip


def merge_states(out_a, lse_a, out_b, lse_b) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``refrag_kernels.merge_states``."""
    out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=lse_a.dtype, device=lse_a.device)
    if out.numel():
        with launch.on(out.device):
            merge_states_fwd_kernel[_merge_grid(out)](
                out_a, lse_a, out_b, lse_b, out, lse, *_merge_shape(out_a, lse_a, out_b, lse_b), STATES=_STATES,
                D=out.shape[2], BD=launch.width(out.shape[2]),
            )  # fmt: skip
    return out, lse


def merge_states_backward(grad_out, grad_lse, out_a, lse_a, out_b, lse_b) -> tuple[torch.Tensor, ...]:
    """Return the gradients of the four arguments."""
    gradients = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (out_a, lse_a, out_b, lse_b)]
    if out_a.numel():
        with launch.on(out_a.device):
            merge_states_bwd_kernel[_merge_grid(out_a)](
                grad_out.contiguous(), grad_lse.contiguous(), out_a, lse_a, out_b, lse_b, *gradients,
                *_merge_shape(out_a, lse_a, out_b, lse_b), STATES=_STATES, D=out_a.shape[2],
                BD=launch.width(out_a.shape[2]),
            )  # fmt: skip
    return tuple(gradients)


def _merge_grid(out: torch.Tensor) -> tuple[int]:
    return (triton.cdiv(out.shape[0] * out.shape[1], _STATES),)


def _merge_shape(out_a, lse_a, out_b, lse_b) -> list[int]:
    """Return the number of states and of heads, and the strides of both states."""
    strides = [stride for t in (out_a, lse_a, out_b, lse_b) for stride in t.stride()[:2]]
    return [out_a.shape[0] * out_a.shape[1], out_a.shape[1], *strides]
