"""select_chunk_rows: keep the best rows of each chunk's keys and values, a choice of its own for each head."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch

from refrag_kernels import values
from refrag_kernels.registration import register_op
from refrag_kernels.support import REFERENCE, Support
from refrag_kernels.validation import (
    FLOAT_DTYPES,
    as_int,
    check_dtype,
    check_head_dim,
    check_last_contiguous,
    check_same_device,
    check_same_dtype,
    check_shape,
    remembered,
)


@remembered
def _check(
    k: torch.Tensor,
    v: torch.Tensor,
    chunk_offsets: torch.Tensor,
    kept_offsets: torch.Tensor,
    num_kept: int,
    scores: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
) -> None:
    for name, tensor in (("k", k), ("v", v)):
        check_dtype(name, tensor, *FLOAT_DTYPES)
    check_same_dtype(k=k, v=v)
    check_shape("k", k, "T", "H_kv", "D")
    check_shape("v", v, *k.shape)
    check_head_dim("k", k)
    check_last_contiguous(k=k, v=v)
    for name, offsets in (("chunk_offsets", chunk_offsets), ("kept_offsets", kept_offsets)):
        check_dtype(name, offsets, torch.int32)
    if chunk_offsets.dim() != 1 or chunk_offsets.shape[0] == 0:
        raise ValueError(f"chunk_offsets: got shape {list(chunk_offsets.shape)}, needs [C + 1]")
    check_shape("kept_offsets", kept_offsets, *chunk_offsets.shape)
    if num_kept < 0:
        raise ValueError(f"num_kept: got {num_kept}, needs 0 or more")
    check_same_device(k=k, v=v, chunk_offsets=chunk_offsets, kept_offsets=kept_offsets, scores=scores, cos=cos, sin=sin)
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    if scores is not None:
        check_dtype("scores", scores, dtype)
        check_shape("scores", scores, *k.shape[:2])
    if (cos is None) != (sin is None):
        raise ValueError(f"{'cos' if cos is None else 'sin'}: got None, needs a table, as there is one of the other")
    if cos is not None and sin is not None:
        _check_tables(k, scores, cos, sin, dtype)


def _check_tables(
    k: torch.Tensor, scores: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype
) -> None:
    if scores is not None:
        raise ValueError("cos, sin: got tables together with scores, which they don't affect; needs None")
    check_dtype("cos", cos, dtype)
    check_dtype("sin", sin, dtype)
    check_shape("cos", cos, k.shape[0], "R / 2")
    check_shape("sin", sin, *cos.shape)
    if not 0 < 2 * cos.shape[1] <= k.shape[2]:
        raise ValueError(f"cos: got {cos.shape[1]} columns, needs 1 to {k.shape[2] // 2}, half of head_dim")
    check_last_contiguous(cos=cos, sin=sin)


def _fake(k, v, chunk_offsets, kept_offsets, num_kept, scores, cos, sin, *, backend=None):
    _check(k, v, chunk_offsets, kept_offsets, num_kept, scores, cos, sin)
    shape = (num_kept, *k.shape[1:])
    return k.new_empty(shape), v.new_empty(shape), chunk_offsets.new_empty(shape[:2])


_select_chunk_rows = register_op(
    "select_chunk_rows(Tensor k, Tensor v, Tensor chunk_offsets, Tensor kept_offsets, SymInt num_kept, Tensor? scores, "
    "Tensor? cos, Tensor? sin, *, str? backend=None) -> (Tensor, Tensor, Tensor)",
    family="chunk_rows",
    support=[
        Support("cuda", missing="has no select_chunk_rows"),
        Support("triton"),
        Support("cpu"),
        REFERENCE,
    ],
    fake=_fake,
    values=values.check_select_chunk_rows,
)


def kept_offsets(chunk_offsets: torch.Tensor, keep: int | Sequence[int] | torch.Tensor) -> torch.Tensor:
    """Return where the kept rows of each chunk start in the results of ``select_chunk_rows``.

    Runs on the CPU, once per layout: the number of rows that are kept is the last entry, known without a
    synchronization.

    Parameters
    ----------
    chunk_offsets : Tensor [C + 1], int32
        First row of each chunk, on the CPU.
    keep : int, or sequence or integer Tensor [C]
        How many rows of each chunk to keep, 0 or more. A chunk with no more rows is kept whole.

    Returns
    -------
    Tensor [C + 1], int32
        The running sum of ``min(keep[c], length of chunk c)``, from 0.

    Raises
    ------
    TypeError, ValueError
        If a dtype, shape or device doesn't fit, the offsets don't ascend from 0, or a number is negative.

    Examples
    --------
    >>> import torch, refrag_kernels as rk
    >>> rk.kept_offsets(torch.tensor([0, 8, 16, 19], dtype=torch.int32), [1, 2, 8])
    tensor([0, 1, 3, 6], dtype=torch.int32)
    """
    check_dtype("chunk_offsets", chunk_offsets, torch.int32)
    if chunk_offsets.dim() != 1 or chunk_offsets.shape[0] == 0:
        raise ValueError(f"chunk_offsets: got shape {list(chunk_offsets.shape)}, needs [C + 1]")
    if chunk_offsets.device.type != "cpu":
        raise ValueError(f"chunk_offsets: got device {chunk_offsets.device}, needs cpu, before they are moved")
    values.check_chunk_offsets(chunk_offsets)
    lengths = chunk_offsets.diff()
    if isinstance(keep, numbers.Integral):
        counts = torch.full_like(lengths, as_int("keep", keep, 0))
    else:
        counts = torch.as_tensor(keep, device="cpu")
        check_shape("keep", counts, *lengths.shape)
        if counts.numel() and (counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool):
            raise TypeError(f"keep: got dtype {str(counts.dtype).removeprefix('torch.')}, needs integers")
        if bool((counts < 0).any()):
            raise ValueError(f"keep: got {int(counts.min())}, needs 0 or more")
    kept = torch.minimum(counts.long(), lengths.long())
    return torch.nn.functional.pad(kept.cumsum(0), (1, 0)).int()


def select_chunk_rows(
    k: torch.Tensor,
    v: torch.Tensor,
    chunk_offsets: torch.Tensor,
    kept_offsets: torch.Tensor,
    num_kept: int,
    scores: torch.Tensor | None = None,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keep the best rows of each chunk's keys and values, for each key/value head by itself and in their order.

    Without scores the best rows are those most unlike their chunk: the score is minus the cosine between a key and the
    mean of its chunk's keys. It needs no second pass over the text; ``attention_received`` makes better scores.

    Parameters
    ----------
    k, v : Tensor [T, H_kv, D]
        Keys and values of all chunks, one after another: float32, bfloat16 or float16 (the reference also float64). D
        is a multiple of 8 up to 256. The last dimension must be contiguous; the others may have any stride.
    chunk_offsets : Tensor [C + 1], int32
        First row of each chunk, as in ``ChunkLayout.chunk_offsets``; rows beyond the last entry are ignored.
    kept_offsets : Tensor [C + 1], int32
        Where the kept rows of each chunk start in the results, from ``kept_offsets``: chunk c keeps
        ``kept_offsets[c + 1] - kept_offsets[c]`` rows, at most as many as it has.
    num_kept : int
        Rows of the results: ``int(kept_offsets[-1])`` on the CPU, or more, such as the capacity of a buffer.
    scores : Tensor [T, H_kv], float32, optional
        Of each row and head (float64 if k is). Of equal scores the first row's is the better one. NaN is worse than
        any number.
    cos, sin : Tensor [T, R / 2], float32, optional
        The rotation (RoPE) that was applied to each row's key, if any (float64 if k is): the mean and the cosine are
        those of the keys before it. It turns the pairs of elements d and d + R / 2 of the first R, as in Llama. Only
        without scores.
    backend : str, optional
        Backends that may run this call, in order; default the fastest that supports it.

    Returns
    -------
    k_kept, v_kept : Tensor [num_kept, H_kv, D]
        The chosen rows, as they are. Rows beyond ``kept_offsets[-1]`` are 0. Not differentiable.
    rows : Tensor [num_kept, H_kv], int32
        Which rows of k and v they are; -1 beyond ``kept_offsets[-1]``.

    Raises
    ------
    TypeError, ValueError
        If a dtype, shape, stride or device is wrong, or, on the CPU, a chunk is empty, the offsets don't ascend from 0,
        or a chunk keeps more rows than it has.

    Notes
    -----
    A NaN or inf in a key affects the choice in its own chunk and head only. On a GPU a chunk whose offsets are invalid
    gives zeros and -1.

    Examples
    --------
    >>> import torch, refrag_kernels as rk
    >>> offsets = torch.tensor([0, 3, 5], dtype=torch.int32)
    >>> kept = rk.kept_offsets(offsets, 1)
    >>> k = v = torch.arange(5.0)[:, None, None].repeat(1, 1, 8)
    >>> scores = torch.tensor([[0.0], [2.0], [1.0], [3.0], [3.0]])
    >>> k_kept, v_kept, rows = rk.select_chunk_rows(k, v, offsets, kept, int(kept[-1]), scores)
    >>> rows.flatten(), k_kept[:, 0, 0]
    (tensor([1, 3], dtype=torch.int32), tensor([1., 3.]))
    """
    if type(num_kept) is not int and not isinstance(num_kept, torch.SymInt):
        num_kept = as_int("num_kept", num_kept, 0)
    _check(k, v, chunk_offsets, kept_offsets, num_kept, scores, cos, sin)
    return _select_chunk_rows(k, v, chunk_offsets, kept_offsets, num_kept, scores, cos, sin, backend=backend)
