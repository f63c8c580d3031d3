"""pool_chunks on GPUs by Triton."""

from __future__ import annotations

import torch
import triton

from refrag_kernels.triton_kernels import launch
from refrag_kernels.triton_kernels.pooling_kernels import pool_chunks_bwd_kernel, pool_chunks_fwd_kernel

# Columns per program: 1 KiB of 16-bit values, four accesses of 128 bytes for each of 2 warps. Rows per iteration:
# chunks have 1 to 32.
_COLUMNS, _ROWS = 512, 8


def pool_chunks(hidden: torch.Tensor, chunk_offsets: torch.Tensor, mode: str) -> torch.Tensor:
    """See ``refrag_kernels.pool_chunks``; a chunk whose rows are not within ``hidden`` gives zeros."""
    chunks, columns = chunk_offsets.shape[0] - 1, hidden.shape[1]
    out = torch.empty(chunks, columns, dtype=hidden.dtype, device=hidden.device)
    if out.numel():
        with launch.on(hidden.device):
            pool_chunks_fwd_kernel[(chunks, triton.cdiv(columns, _COLUMNS))](
                hidden, chunk_offsets.contiguous(), out, hidden.shape[0], hidden.stride(0), D=columns,
                BLOCK_D=_COLUMNS, BLOCK_M=_ROWS, MODE=mode,
            )  # fmt: skip
    return out


def pool_chunks_backward(grad: torch.Tensor, chunk_offsets: torch.Tensor, mode: str, rows: int) -> torch.Tensor:
    """Return the gradient [rows, d] of ``hidden``."""
    columns = grad.shape[1]
    out = torch.empty(rows, columns, dtype=grad.dtype, device=grad.device)
    if out.numel():
        with launch.on(grad.device):
            pool_chunks_bwd_kernel[(triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))](
                grad, chunk_offsets.contiguous(), out, rows, grad.shape[0], grad.stride(0), D=columns,
                BLOCK_D=_COLUMNS, BLOCK_M=_ROWS, MODE=mode,
            )  # fmt: skip
    return out
