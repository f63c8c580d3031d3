"""project_chunks and embed_mixed on GPUs by Triton.

The hidden layer has the dtype of the weights, as with torch.nn.Linear; products are accumulated in float32.
"""

from __future__ import annotations

import torch
import triton

from refrag_kernels.triton_kernels import configs, launch
from refrag_kernels.triton_kernels.projection_kernels import (
    embed_text_kernel,
    linear_kernel,
    list_slots_kernel,
    sum_rows_kernel,
)

_COLUMNS = 1024  # per program that moves rows: 2 KiB of 16-bit values, 16 bytes for each thread of 4 warps


def _linear(
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    *,
    expected_rows: int | None = None,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    before: torch.Tensor | None = None,
    slope: bool = False,
    listed: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Write epilogue(a b) to ``out`` and return it; a [M, K] and b [K, N] have any strides, out is contiguous.

    ``listed``: the rows, count and slots of ``linear_kernel``; M is then the length of rows.
    """
    rows = a.shape[0] if listed is None else listed[0].shape[0]
    columns, inner = b.shape[1], b.shape[0]
    if not rows or not columns:
        return out
    target = launch.architecture(a.device)
    config = configs.linear(target, expected_rows or rows, a.element_size())
    p_rows, p_count, p_slots = (None, None, None) if listed is None else listed
    with launch.on(a.device):
        linear_kernel[(triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n),)](
            a, b, bias, before, out, p_rows, p_count, p_slots, rows, columns, inner, *a.stride(), *b.stride(),
            BIAS=bias is not None, ACTIVATION=activation, KEEP=before is not None and not slope, SLOPE=slope,
            LISTED=listed is not None, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            PRECISION=launch.precision(a.dtype, target), num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out


def project_chunks(chunks, w1, b1, w2, b2, activation, packed) -> torch.Tensor:
    """See ``refrag_kernels.project_chunks``; ``packed`` is for the CPU only."""
    hidden = _linear(chunks, w1.T, chunks.new_empty(chunks.shape[0], w1.shape[0]), bias=b1, activation=activation)
    return _linear(hidden, w2.T, chunks.new_empty(chunks.shape[0], w2.shape[0]), bias=b2)


def project_chunks_backward(grad, chunks, w1, b1, w2, b2, activation) -> tuple[torch.Tensor, ...]:
    """Return the gradients of chunks, w1, b1, w2, b2; an absent bias has an empty one."""
    shape = (chunks.shape[0], w1.shape[0])
    before = torch.empty(shape, dtype=torch.float32, device=chunks.device)
    hidden = _linear(chunks, w1.T, chunks.new_empty(shape), bias=b1, activation=activation, before=before)
    dbefore = _linear(grad, w2, chunks.new_empty(shape), activation=activation, before=before, slope=True)
    return (
        _linear(dbefore, w1, torch.empty(chunks.shape, dtype=chunks.dtype, device=chunks.device)),
        _linear(dbefore.T, chunks, torch.empty(w1.shape, dtype=w1.dtype, device=w1.device)),
        _column_sums(dbefore, b1),
        _linear(grad.T, hidden, torch.empty(w2.shape, dtype=w2.dtype, device=w2.device)),
        _column_sums(grad, b2),
    )


def _column_sums(grad: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if bias is None:
        return grad.new_empty(0)
    return grad.sum(0, dtype=torch.float32).to(grad.dtype)


def embed_mixed(
    token_ids, token_table, chunks, slot_of_row, w1, b1, w2, b2, activation, token_scale, packed
) -> torch.Tensor:
    """See ``refrag_kernels.embed_mixed``. The second layer gathers the chunks of slots and writes the rows of slots.

    A row whose token or slot is out of range becomes zeros; REFRAG_KERNELS_CHECK=1 raises instead.
    """
    rows, columns, count = token_ids.shape[0], token_table.shape[1], chunks.shape[0]
    out = torch.empty(rows, columns, dtype=token_table.dtype, device=token_table.device)
    if not out.numel():
        return out
    with launch.on(out.device):
        embed_text_kernel[(rows, triton.cdiv(columns, _COLUMNS))](
            token_ids, token_table, slot_of_row, out, token_scale, token_table.shape[0], count, token_table.stride(0),
            D=columns, BLOCK_D=_COLUMNS,
        )  # fmt: skip
        if not count:
            return out
        slots = torch.empty(rows, dtype=torch.int32, device=out.device)
        number = torch.empty(1, dtype=torch.int32, device=out.device)
        list_slots_kernel[(1,)](slot_of_row, slots, number, rows, count, BLOCK=1024, num_warps=8)
    hidden = _linear(chunks, w1.T, chunks.new_empty(count, w1.shape[0]), bias=b1, activation=activation)
    # Only the device knows the number of slots; a mixed sequence has about as many as chunks.
    return _linear(hidden, w2.T, out, expected_rows=count, bias=b2, listed=(slots, number, slot_of_row))


def _sum_rows(grad: torch.Tensor, keys: torch.Tensor, out: torch.Tensor, scale: float) -> torch.Tensor:
    """Add each row of ``grad``, times ``scale``, to row ``keys[row]`` of ``out`` (zeros); skip keys out of range."""
    if not grad.numel() or not out.numel():
        return out
    ordered, order = torch.sort(keys, stable=True)
    with launch.on(grad.device):
        sum_rows_kernel[(grad.shape[0], triton.cdiv(grad.shape[1], _COLUMNS))](
            grad, ordered, order, out, grad.shape[0], out.shape[0], scale, D=grad.shape[1], BLOCK_D=_COLUMNS
        )
    return out


def embed_mixed_backward(
    grad, token_ids, token_table, chunks, slot_of_row, w1, b1, w2, b2, activation, token_scale
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of token_table, chunks, w1, b1, w2, b2."""
    text = torch.where(slot_of_row < 0, token_ids, -1)
    dtable = torch.zeros(token_table.shape, dtype=grad.dtype, device=grad.device)
    dprojected = torch.zeros(chunks.shape[0], grad.shape[1], dtype=grad.dtype, device=grad.device)
    grad = grad.contiguous()
    _sum_rows(grad, text, dtable, token_scale)
    _sum_rows(grad, slot_of_row, dprojected, 1.0)
    return dtable, *project_chunks_backward(dprojected, chunks, w1, b1, w2, b2, activation)
