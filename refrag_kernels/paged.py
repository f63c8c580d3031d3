"""Attention over a paged key/value cache: paged_attention, append_kv and merge_states.

This module has the public functions, schemas, fake kernels and autograd; kernels are in the backends' folders.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from refrag_kernels import validation, values
from refrag_kernels.registration import register_op
from refrag_kernels.selection import effective_backend
from refrag_kernels.support import HALF, REFERENCE, TENSOR_CORES, Support

if TYPE_CHECKING:
    from refrag_kernels.visible import VisibleRanges

_FAMILY = "paged"


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lengths: torch.Tensor,
    *,
    q_offsets: torch.Tensor | None = None,
    visible: VisibleRanges | tuple[torch.Tensor, torch.Tensor] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | tuple[int, int] | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend from the last rows of each sequence to its keys and values in a paged cache.

    Query row i of a sequence attends to key j if j <= i, the window allows it, and j is in one of the row's visible
    ranges; rows and keys count from the sequence's start. ``out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j]``: the
    softmax runs over the keys that the row attends to, and over its head's sink.

    Parameters
    ----------
    q : Tensor [T_q, H_q, D]
        Query rows of all sequences, packed. float32, bfloat16 or float16 (the reference also takes float64).
        D is a multiple of 8, at most 256.
    k_pages, v_pages : Tensor [P, page, H_kv, D]
        The cache, in the dtype of ``q``. Any strides with a contiguous last dimension; H_q is a multiple of H_kv.
    page_table : Tensor, int32 [B, max_pages]
        Page of each block of ``page`` rows. Entries beyond a sequence's length are never read.
    kv_lengths : Tensor, int32 [B]
        Keys of each sequence in the cache, those of its query rows included. At length 0 the rows are fully masked.
    q_offsets : Tensor, int32 [B + 1], optional
        First row of each sequence in ``q``: its rows are the last ones of the sequence. A sequence may have none.
        Without it each sequence has one row (decode), so T_q = B.
    visible : VisibleRanges, optional
        ``(indptr, ranges)``, int32 [T_q + 1] and [R, 2]: the keys that the mask lets each query row attend to.
    scale : float, optional
        Factor of the dot products; 1 / sqrt(D) by default.
    softcap : float, optional
        Positive. Scores become ``softcap * tanh(scale * q . k / softcap)``.
    window : int or (int, int), optional
        int w: a row attends to keys j > i - w. (left, right): j >= i - left, -1 for no bound; a bound to the right has
        no effect, as causality always holds.
    sinks : Tensor, float32 [H_q], optional
        Logits that join each head's denominator and lse, not its output.
    return_lse : bool
        Also return the log of the softmax's denominator.
    backend : str, optional
        One backend, or an ordered list such as ``"cuda,triton"``.

    Returns
    -------
    out : Tensor [T_q, H_q, D]
        In the dtype of ``q``. 0 for a fully masked row.
    lse : Tensor [T_q, H_q], if ``return_lse``
        float32 (float64 for float64), natural log. For a fully masked row -inf, or its head's sink.

    Raises
    ------
    TypeError, ValueError
        If an argument's dtype, shape, device, stride or (on the CPU) value is wrong; names the argument.
    RuntimeError
        If no allowed backend can serve the call, or if the result is differentiated: this op is for inference.

    Notes
    -----
    Under autocast ``q`` is cast to the dtype of the cache; the pages never are cast.

    Examples
    --------
    >>> import torch, refrag_kernels as rk
    >>> k_pages = torch.zeros(2, 16, 1, 8)
    >>> v_pages = torch.ones(2, 16, 1, 8)
    >>> v_pages[1, 0] = 5.0
    >>> table = torch.tensor([[0, 1]], dtype=torch.int32)
    >>> lengths = torch.tensor([17], dtype=torch.int32)
    >>> out = rk.paged_attention(torch.ones(1, 2, 8), k_pages, v_pages, table, lengths, window=2)
    >>> out[0, :, 0].tolist()
    [3.0, 3.0]
    """
    q = _autocast(q, k_pages)
    indptr, ranges = (None, None) if visible is None else visible
    left, right = validation.window_bounds(window)
    if scale is not None or softcap is not None:
        validation.check_score_options(scale, softcap)
    _check_attention(q, k_pages, v_pages, page_table, kv_lengths, q_offsets, indptr, ranges, sinks)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    out, lse = _paged_attention_op(
        q, k_pages, v_pages, page_table, kv_lengths, q_offsets, indptr, ranges, scale, softcap or 0.0, left, right,
        sinks, backend=backend,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lengths: torch.Tensor,
    q_offsets: torch.Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Write new keys and values into the pages of their sequences, in place.

    Row r of the n new rows of a sequence becomes its row ``kv_lengths - n + r``.

    Parameters
    ----------
    k, v : Tensor [T, H_kv, D]
        New rows of all sequences, packed, in the dtype of the pages.
    k_pages, v_pages : Tensor [P, page, H_kv, D]
        The cache; changed in place. Any strides with a contiguous last dimension.
    page_table : Tensor, int32 [B, max_pages]
        Page of each block of ``page`` rows. Only the entries of rows that are written are read.
    kv_lengths : Tensor, int32 [B]
        Keys of each sequence once the new rows are in.
    q_offsets : Tensor, int32 [B + 1]
        First row of each sequence in ``k`` and ``v``. A sequence may have none.
    backend : str, optional
        One backend, or an ordered list such as ``"cuda,triton"``.

    Raises
    ------
    TypeError, ValueError
        If an argument's dtype, shape, device, stride or (on the CPU) value is wrong; names the argument.
    RuntimeError
        If pages require grad while gradients are recorded: the op has no backward.

    Notes
    -----
    Under autocast ``k`` and ``v`` are cast to the dtype of the pages. Not differentiable: the pages get the values of
    ``k`` and ``v``, not their history.

    Examples
    --------
    >>> import torch, refrag_kernels as rk
    >>> k_pages, v_pages = torch.zeros(3, 2, 1, 8), torch.zeros(3, 2, 1, 8)
    >>> table = torch.tensor([[2, 0]], dtype=torch.int32)
    >>> rows = torch.arange(1.0, 4.0).reshape(3, 1, 1).expand(3, 1, 8).contiguous()
    >>> lengths, offsets = torch.tensor([3], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    >>> rk.append_kv(rows, rows, k_pages, v_pages, table, lengths, offsets)
    >>> k_pages[:, :, 0, 0].tolist()
    [[3.0, 0.0], [0.0, 0.0], [1.0, 2.0]]
    """
    k, v = _autocast(k, k_pages), _autocast(v, v_pages)
    _check_append(k, v, k_pages, v_pages, page_table, kv_lengths, q_offsets)
    _check_no_gradients(k_pages, v_pages)
    _append_kv_op(k, v, k_pages, v_pages, page_table, kv_lengths, q_offsets, backend=backend)


def merge_states(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention over two disjoint sets of keys into attention over both.

    ``lse = log(exp(lse_a) + exp(lse_b))`` and ``out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b``; exact, as an
    lse is the log of a softmax's denominator.

    Parameters
    ----------
    out_a, out_b : Tensor [T, H, D]
        float32, bfloat16, float16 or float64, both the same.
    lse_a, lse_b : Tensor [T, H]
        float32 (float64 with float64 outputs), natural log. Where one is -inf its output is ignored.
    backend : str, optional
        One backend, or an ordered list such as ``"cuda,triton"``.

    Returns
    -------
    out : Tensor [T, H, D]
        In the dtype of ``out_a``. 0 where both states are empty (lse -inf).
    lse : Tensor [T, H]
        In the dtype of ``lse_a``; -inf where both are.

    Raises
    ------
    TypeError, ValueError
        If an argument's dtype, shape, device or stride is wrong; names the argument.

    Notes
    -----
    Differentiable in all four arguments, once. With sinks, only one of the states may carry them.

    Examples
    --------
    >>> import torch, refrag_kernels as rk
    >>> out, lse = rk.merge_states(
    ...     torch.ones(1, 1, 8), torch.zeros(1, 1), torch.full((1, 1, 8), 5.0), torch.full((1, 1), 3.0).log()
    ... )
    >>> out[0, 0, 0].item(), round(lse.exp().item(), 4)
    (4.0, 4.0)
    """
    _check_states(out_a, lse_a, out_b, lse_b)
    return _merge_states_op(out_a, lse_a, out_b, lse_b, backend=backend)


def _autocast(rows: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    # torch's autocast would cast the whole cache in each call, and append_kv would write into the copy.
    if not isinstance(rows, torch.Tensor) or not validation.autocast_is_on(rows.device):
        return rows
    return rows.to(pages.dtype) if validation.same_under_autocast(rows.dtype, pages.dtype) else rows


def _check_indices(name: str, tensor: torch.Tensor, *shape: int | str) -> None:
    validation.check_dtype(name, tensor, torch.int32)
    validation.check_shape(name, tensor, *shape)
    if tensor.stride(-1) != 1:
        validation.check_last_contiguous(**{name: tensor})


def _check_cache(
    rows_name: str,
    rows: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lengths: torch.Tensor,
) -> None:
    """Check the cache and its tables, and ``rows`` [T, H, D]: the queries, or the keys to append."""
    validation.check_dtype(rows_name, rows, *validation.FLOAT_DTYPES)
    validation.check_dtype("k_pages", k_pages, rows.dtype)
    validation.check_dtype("v_pages", v_pages, rows.dtype)
    validation.check_shape(rows_name, rows, "T", "H", "D")
    validation.check_head_dim(rows_name, rows)
    validation.check_shape("k_pages", k_pages, "P", "page", "H_kv", rows.shape[-1])
    validation.check_shape("v_pages", v_pages, *k_pages.shape)
    if k_pages.shape[1] == 0 or k_pages.shape[2] == 0:
        raise ValueError(f"k_pages: got shape {list(k_pages.shape)}, needs at least one row per page and one head")
    validation.check_last_contiguous(**{rows_name: rows, "k_pages": k_pages, "v_pages": v_pages})
    _check_indices("kv_lengths", kv_lengths, "B")
    _check_indices("page_table", page_table, kv_lengths.shape[0], "max_pages")
    if page_table.shape[1] * k_pages.shape[1] > validation.INT32_MAX:
        raise ValueError(
            f"page_table: got {page_table.shape[1]} pages of {k_pages.shape[1]} rows per sequence, needs at most "
            f"{validation.INT32_MAX} rows: positions are int32"
        )


@validation.remembered
def _check_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lengths: torch.Tensor,
    q_offsets: torch.Tensor | None,
    indptr: torch.Tensor | None,
    ranges: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:
    _check_cache("q", q, k_pages, v_pages, page_table, kv_lengths)
    validation.check_heads(q, k_pages, sinks)
    rows = q.shape[0]
    if q_offsets is not None:
        _check_indices("q_offsets", q_offsets, kv_lengths.shape[0] + 1)
    elif rows != kv_lengths.shape[0]:
        raise ValueError(f"q: got {rows} rows, needs {kv_lengths.shape[0]}, one per sequence, or q_offsets")
    if indptr is not None:
        assert ranges is not None  # the public function passes both or neither
        _check_indices("visible.indptr", indptr, rows + 1)
        _check_indices("visible.ranges", ranges, "R", 2)
    if sinks is not None:
        validation.check_last_contiguous(sinks=sinks)
    validation.check_same_device(
        q=q, k_pages=k_pages, v_pages=v_pages, page_table=page_table, kv_lengths=kv_lengths, q_offsets=q_offsets,
        **{"visible.indptr": indptr, "visible.ranges": ranges}, sinks=sinks,
    )  # fmt: skip


@validation.remembered
def _check_append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lengths: torch.Tensor,
    q_offsets: torch.Tensor,
) -> None:
    _check_cache("k", k, k_pages, v_pages, page_table, kv_lengths)
    validation.check_shape("k", k, "T", k_pages.shape[2], k_pages.shape[3])
    validation.check_dtype("v", v, k.dtype)
    validation.check_shape("v", v, *k.shape)
    validation.check_last_contiguous(v=v)
    _check_indices("q_offsets", q_offsets, kv_lengths.shape[0] + 1)
    validation.check_same_device(
        k=k, v=v, k_pages=k_pages, v_pages=v_pages, page_table=page_table, kv_lengths=kv_lengths, q_offsets=q_offsets
    )


def _check_no_gradients(k_pages: torch.Tensor, v_pages: torch.Tensor) -> None:
    if (k_pages.requires_grad or v_pages.requires_grad) and torch.is_grad_enabled():
        name = "k_pages" if k_pages.requires_grad else "v_pages"
        raise RuntimeError(
            f"{name}: requires grad, needs pages without: append_kv writes into them and has no gradient"
        )


@validation.remembered
def _check_states(out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor) -> None:
    validation.check_dtype("out_a", out_a, *validation.FLOAT_DTYPES)
    validation.check_shape("out_a", out_a, "T", "H", "D")
    validation.check_dtype("out_b", out_b, out_a.dtype)
    validation.check_shape("out_b", out_b, *out_a.shape)
    lse_dtype = torch.float64 if out_a.dtype == torch.float64 else torch.float32
    validation.check_dtype("lse_a", lse_a, lse_dtype)
    validation.check_dtype("lse_b", lse_b, lse_dtype)
    validation.check_shape("lse_a", lse_a, *out_a.shape[:2])
    validation.check_shape("lse_b", lse_b, *out_a.shape[:2])
    validation.check_last_contiguous(out_a=out_a, out_b=out_b)
    validation.check_same_device(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)


def _paged_attention_fake(
    q, k_pages, v_pages, page_table, kv_lengths, q_offsets, visible_indptr, visible_ranges,
    scale, softcap, window_left, window_right, sinks, *, backend=None,
):  # fmt: skip
    _check_attention(
        q, k_pages, v_pages, page_table, kv_lengths, q_offsets, visible_indptr, visible_ranges, sinks
    )  # fmt: skip
    out = q.new_empty(q.shape)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, q.new_empty(q.shape[:2], dtype=lse_dtype)


def _append_kv_fake(k, v, k_pages, v_pages, page_table, kv_lengths, q_offsets, *, backend=None):
    _check_append(k, v, k_pages, v_pages, page_table, kv_lengths, q_offsets)
    _check_no_gradients(k_pages, v_pages)


def _merge_states_fake(out_a, lse_a, out_b, lse_b, *, backend=None):
    _check_states(out_a, lse_a, out_b, lse_b)
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


def _merge_states_backward_fake(grad_out, grad_lse, out_a, lse_a, out_b, lse_b, *, backend=None):
    _check_states(out_a, lse_a, out_b, lse_b)
    return tuple(tensor.new_empty(tensor.shape) for tensor in (out_a, lse_a, out_b, lse_b))


def _merge_states_context(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.backend = effective_backend(keyword_only_inputs["backend"])


def _merge_states_backward(ctx, grad_out, grad_lse):
    return _merge_states_backward_op(grad_out, grad_lse, *ctx.saved_tensors, backend=ctx.backend)


# Triton's attention and append_kv are the faster ones on an H100 (docs/gpu-results.md).
_paged_attention_op = register_op(
    "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor kv_lengths, Tensor? q_offsets,"
    " Tensor? visible_indptr, Tensor? visible_ranges, float scale, float softcap, int window_left, int window_right,"
    " Tensor? sinks, *, str? backend=None) -> (Tensor, Tensor)",
    family=_FAMILY,
    support=[
        Support("triton"),
        Support("cuda", HALF, head_dims=(64, 96, 128), capability=TENSOR_CORES, aligned=("q", "k_pages", "v_pages")),
        Support("cpu", binds=True),
        REFERENCE,
    ],
    fake=_paged_attention_fake,
    values=values.check_paged_attention,
)
_append_kv_op = register_op(
    "append_kv(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor page_table, Tensor kv_lengths,"
    " Tensor q_offsets, *, str? backend=None) -> ()",
    family=_FAMILY,
    support=[Support("triton"), Support("cuda"), Support("cpu", binds=True), REFERENCE],
    fake=_append_kv_fake,
    values=values.check_append_kv,
)
_merge_states_backward_op = register_op(
    "merge_states_backward(Tensor grad_out, Tensor grad_lse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, *,"
    " str? backend=None) -> (Tensor, Tensor, Tensor, Tensor)",
    family=_FAMILY,
    support=[Support("cuda", missing="has no gradients of merge_states"), Support("triton"), Support("cpu"), REFERENCE],
    fake=_merge_states_backward_fake,
)
_merge_states_op = register_op(
    "merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, *, str? backend=None) -> (Tensor, Tensor)",
    family=_FAMILY,
    support=[Support("cuda"), Support("triton"), Support("cpu", binds=True), REFERENCE],
    fake=_merge_states_fake,
    setup_context=_merge_states_context,
    backward=_merge_states_backward,
)
