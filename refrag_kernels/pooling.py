"""pool_chunks: one row per chunk from the rows of its tokens."""

from __future__ import annotations

import torch

from refrag_kernels import values
from refrag_kernels.registration import register_op
from refrag_kernels.selection import effective_backend
from refrag_kernels.support import REFERENCE, Support
from refrag_kernels.validation import (
    FLOAT_DTYPES,
    check_dtype,
    check_last_contiguous,
    check_same_device,
    check_shape,
    remembered,
)

MODES = ("mean", "first", "last")


@remembered
def _check(hidden: torch.Tensor, chunk_offsets: torch.Tensor, mode: str) -> None:
    check_dtype("hidden", hidden, *FLOAT_DTYPES)
    check_shape("hidden", hidden, "T", "d")
    check_last_contiguous(hidden=hidden)
    check_dtype("chunk_offsets", chunk_offsets, torch.int32)
    if chunk_offsets.dim() != 1 or chunk_offsets.shape[0] == 0:
        raise ValueError(f"chunk_offsets: got shape {list(chunk_offsets.shape)}, needs [C + 1]")
    check_same_device(hidden=hidden, chunk_offsets=chunk_offsets)
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, needs one of {', '.join(MODES)}")


def _fake(hidden, chunk_offsets, mode, *, backend=None):
    _check(hidden, chunk_offsets, mode)
    return hidden.new_empty(chunk_offsets.shape[0] - 1, hidden.shape[1])


def _fake_backward(grad, chunk_offsets, mode, rows, *, backend=None):
    return grad.new_empty(rows, grad.shape[1])


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    hidden, chunk_offsets, ctx.mode = inputs
    ctx.save_for_backward(chunk_offsets)
    ctx.rows = hidden.shape[0]
    ctx.backend = effective_backend(keyword_only_inputs["backend"])


def _backward(ctx, grad):
    (chunk_offsets,) = ctx.saved_tensors
    op = torch.ops.refrag.pool_chunks_backward
    return op(grad.contiguous(), chunk_offsets, ctx.mode, ctx.rows, backend=ctx.backend), None, None


_pool_chunks = register_op(
    "pool_chunks(Tensor hidden, Tensor chunk_offsets, str mode, *, str? backend=None) -> Tensor",
    family="pooling",
    support=[Support("cuda"), Support("triton"), Support("cpu"), REFERENCE],
    fake=_fake,
    values=values.check_pool_chunks,
    setup_context=_setup_context,
    backward=_backward,
)
# The gradient spreads rows: torch's own ops are limited by the memory's bandwidth already.
register_op(
    "pool_chunks_backward(Tensor grad, Tensor chunk_offsets, str mode, SymInt rows, *, str? backend=None) -> Tensor",
    family="pooling",
    support=[
        Support("cuda", FLOAT_DTYPES, fallback="reference"),
        Support("triton"),
        Support("cpu", FLOAT_DTYPES, fallback="reference"),
        REFERENCE,
    ],
    fake=_fake_backward,
)


def pool_chunks(
    hidden: torch.Tensor, chunk_offsets: torch.Tensor, mode: str, *, backend: str | None = None
) -> torch.Tensor:
    """Pool the rows of each chunk into one: REFRAG's chunk embedding c_i from the encoder's last hidden states.

    The paper doesn't say which pooling it uses; RoBERTa's first token (``"first"``) and the mean are common.

    Parameters
    ----------
    hidden : Tensor [T, d]
        Rows of all chunks, one after another: float32, bfloat16 or float16 (the reference also float64). The last
        dimension must be contiguous.
    chunk_offsets : Tensor [C + 1], int32
        First row of each chunk, as in ``ChunkLayout.chunk_offsets``; rows beyond the last entry are ignored.
    mode : {"mean", "first", "last"}
        The mean of a chunk's rows, computed in float32, or its first or last row.
    backend : str, optional
        Backends that may run this call, in order; default the fastest that supports it.

    Returns
    -------
    Tensor [C, d]
        In the dtype of ``hidden``. Differentiable in ``hidden``, once.

    Raises
    ------
    TypeError, ValueError
        If a dtype, shape, stride, device or ``mode`` is wrong, or, on the CPU, the offsets don't ascend from 0 to at
        most T.

    Examples
    --------
    >>> import torch, refrag_kernels as rk
    >>> offsets = torch.tensor([0, 1, 3], dtype=torch.int32)
    >>> rk.pool_chunks(torch.arange(6.0).reshape(3, 2), offsets, "last")
    tensor([[0., 1.],
            [4., 5.]])
    """
    _check(hidden, chunk_offsets, mode)
    return _pool_chunks(hidden, chunk_offsets, mode, backend=backend)
