"""pool_chunks in plain torch: its specification, forward and backward."""

from __future__ import annotations

import torch


def chunk_of_row(chunk_offsets: torch.Tensor, rows: int) -> torch.Tensor:
    """Return the chunk of each row; rows beyond the last chunk have the number of chunks."""
    row = torch.arange(rows, dtype=torch.int32, device=chunk_offsets.device)
    return torch.bucketize(row, chunk_offsets[1:], right=True)


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def pool_chunks(hidden: torch.Tensor, chunk_offsets: torch.Tensor, mode: str) -> torch.Tensor:
    """See ``refrag_kernels.pool_chunks``."""
    if mode == "first":
        return hidden[chunk_offsets[:-1].long()]
    if mode == "last":
        return hidden[chunk_offsets[1:].long() - 1]
    chunks = chunk_offsets.shape[0] - 1
    dtype = _compute_dtype(hidden)
    sums = torch.zeros(chunks + 1, hidden.shape[1], dtype=dtype, device=hidden.device)
    sums.index_add_(0, chunk_of_row(chunk_offsets, hidden.shape[0]), hidden.to(dtype))
    return (sums[:chunks] / chunk_offsets.diff()[:, None]).to(hidden.dtype)


def pool_chunks_backward(grad: torch.Tensor, chunk_offsets: torch.Tensor, mode: str, rows: int) -> torch.Tensor:
    """Return the gradient [rows, d] of ``hidden``."""
    if mode == "mean":
        dtype = _compute_dtype(grad)
        share = torch.zeros(grad.shape[0] + 1, grad.shape[1], dtype=dtype, device=grad.device)
        share[:-1] = grad.to(dtype) / chunk_offsets.diff()[:, None]
        return share[chunk_of_row(chunk_offsets, rows)].to(grad.dtype)
    index = chunk_offsets[:-1].long() if mode == "first" else chunk_offsets[1:].long() - 1
    return torch.zeros(rows, grad.shape[1], dtype=grad.dtype, device=grad.device).index_copy_(0, index, grad)
