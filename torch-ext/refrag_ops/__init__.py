"""CUDA kernels for compressed retrieval-augmented decoding (REFRAG): paged attention, pooling, projection, assembly.

The ops of the library ``refrag_kernels`` that need neither a plan nor a gradient, for inference. Each kernel checks its
indices and drops what leaves a tensor. Written by torch-ext/generate.py: change that, or refrag_kernels.
"""

from __future__ import annotations  # the Hub takes Python 3.9

import torch
import torch.nn.functional as F

from ._ops import add_op_namespace_prefix, ops

_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "none": lambda x: x,
}
_MODES = ("mean", "first", "last")
# Up to so many chunks one kernel reads each weight once; torch's products are faster for more.
_MAX_SMALL_M = 64


def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lengths: torch.Tensor,
    *,
    q_offsets: torch.Tensor | None = None,
    visible: tuple[torch.Tensor, torch.Tensor] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | tuple[int, int] | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend from the last rows of each sequence to its keys and values in a paged cache.

    Query row i of a sequence attends to key j if j <= i, the window allows it, and j is in one of the row's visible
    ranges; rows and keys count from the sequence's start. ``out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j]``: the
    softmax runs over the keys that the row attends to, and over its head's sink.

    Parameters
    ----------
    q : Tensor [T_q, H_q, D]
        Query rows of all sequences, packed. bfloat16 or float16; D is 64 or 96 or 128.
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

    Returns
    -------
    out : Tensor [T_q, H_q, D]
        In the dtype of ``q``. 0 for a fully masked row.
    lse : Tensor [T_q, H_q], if ``return_lse``
        float32 (float64 for float64), natural log. For a fully masked row -inf, or its head's sink.
    """
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: got {softcap}, needs a positive number or None")
    if isinstance(window, int) and window < 1:
        raise ValueError(f"window: got {window}, needs at least 1")
    left = -1 if window is None else window - 1 if isinstance(window, int) else window[0]
    indptr, ranges = (None, None) if visible is None else visible
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = ops.paged_attention(
        q, k_pages, v_pages, page_table, kv_lengths, q_offsets, indptr, ranges, scale, softcap or 0.0, left, 0, sinks
    )
    return (out, lse) if return_lse else out


def append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    kv_lengths: torch.Tensor,
    q_offsets: torch.Tensor,
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
    """
    ops.append_kv(k, v, k_pages, v_pages, page_table, kv_lengths, q_offsets)


def merge_states(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
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

    Returns
    -------
    out : Tensor [T, H, D]
        In the dtype of ``out_a``. 0 where both states are empty (lse -inf).
    lse : Tensor [T, H]
        In the dtype of ``lse_a``; -inf where both are.
    """
    return ops.merge_states(out_a.contiguous(), lse_a.contiguous(), out_b.contiguous(), lse_b.contiguous())


def pool_chunks(
    hidden: torch.Tensor,
    chunk_offsets: torch.Tensor,
    mode: str,
) -> torch.Tensor:
    """Pool the rows of each chunk into one: REFRAG's chunk embedding c_i from the encoder's last hidden states.

    The paper doesn't say which pooling it uses; RoBERTa's first token (``"first"``) and the mean are common.

    Parameters
    ----------
    hidden : Tensor [T, d]
        Rows of all chunks, one after another: float32, bfloat16 or float16. The last
        dimension must be contiguous.
    chunk_offsets : Tensor [C + 1], int32
        First row of each chunk, as in ``ChunkLayout.chunk_offsets``; rows beyond the last entry are ignored.
    mode : {"mean", "first", "last"}
        The mean of a chunk's rows, computed in float32, or its first or last row.

    Returns
    -------
    Tensor [C, d]
        In the dtype of ``hidden``.
    """
    if mode not in _MODES:
        raise ValueError(f"mode: got {mode!r}, needs one of {', '.join(_MODES)}")
    return ops.pool_chunks(hidden, chunk_offsets, mode)


def project_chunks(
    chunks: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    *,
    activation: str = "gelu",
) -> torch.Tensor:
    """Project chunk embeddings into the decoder's embedding space: REFRAG's two-layer phi (section 2).

    ``phi(c) = w2 act(w1 c + b1) + b2``

    Parameters
    ----------
    chunks : Tensor [N, d_enc]
        Chunk embeddings: float32, bfloat16 or float16. The last dimension must be
        contiguous, here and in the weights.
    w1 : Tensor [h, d_enc]
        First layer, in the order of torch.nn.Linear.
    b1 : Tensor [h], optional
    w2 : Tensor [d_dec, h]
        Second layer.
    b2 : Tensor [d_dec], optional
    activation : {"gelu", "gelu_tanh", "silu", "relu", "tanh", "none"}

    Returns
    -------
    Tensor [N, d_dec]
        In the dtype of ``chunks``.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, needs one of {', '.join(_ACTIVATIONS)}")
    half = chunks.dtype in (torch.float16, torch.bfloat16)
    if half and chunks.shape[0] <= _MAX_SMALL_M and w1.shape[0] % 8 == 0 and w1.shape[1] % 8 == 0:
        return ops.project_chunks(chunks, w1, b1, w2, b2, activation, None)
    return F.linear(_ACTIVATIONS[activation](F.linear(chunks, w1, b1)), w2, b2)


def embed_mixed(
    token_ids: torch.Tensor,
    token_table: torch.Tensor,
    chunks: torch.Tensor,
    slot_of_row: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    *,
    activation: str = "gelu",
    token_scale: float = 1.0,
) -> torch.Tensor:
    """Build the decoder's input: token embeddings in text rows, projected chunks in slots (REFRAG, section 2).

    Row t is ``token_table[token_ids[t]] * token_scale`` where ``slot_of_row[t]`` is -1, and else the projection of
    ``chunks[slot_of_row[t]]``, which is written there without an intermediate [N, d_dec] tensor.

    Parameters
    ----------
    token_ids : Tensor [T], int64
        Token of each text row; ignored, not checked, in slots.
    token_table : Tensor [V, d_dec]
        The decoder's token embeddings, in the dtype of the weights.
    chunks : Tensor [N, d_enc]
        Chunk embeddings. A chunk may be in any number of slots, or none.
    slot_of_row : Tensor [T], int32
        -1 for text, else a row of ``chunks``.
    w1, b1, w2, b2, activation
        The projection, as in ``project_chunks``.
    token_scale : float
        Factor of the text rows: Gemma's decoders scale their token embeddings.

    Returns
    -------
    Tensor [T, d_dec]
    """
    projected = project_chunks(chunks, w1, b1, w2, b2, activation=activation)
    return ops.assemble_mixed(token_ids, token_table, projected, slot_of_row, token_scale)


@torch.library.register_fake(add_op_namespace_prefix("paged_attention"))
def _(q, *_):
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.register_fake(add_op_namespace_prefix("append_kv"))
def _(*_):
    return None


@torch.library.register_fake(add_op_namespace_prefix("merge_states"))
def _(out_a, lse_a, out_b, lse_b):
    return torch.empty_like(out_a), torch.empty_like(lse_a)


@torch.library.register_fake(add_op_namespace_prefix("pool_chunks"))
def _(hidden, chunk_offsets, mode):
    return hidden.new_empty(chunk_offsets.shape[0] - 1, hidden.shape[1])


@torch.library.register_fake(add_op_namespace_prefix("project_chunks"))
def _(chunks, w1, b1, w2, b2, activation, packed):
    return chunks.new_empty(chunks.shape[0], w2.shape[0])


@torch.library.register_fake(add_op_namespace_prefix("assemble_mixed"))
def _(token_ids, token_table, projected, slot_of_row, token_scale):
    return token_table.new_empty(token_ids.shape[0], token_table.shape[1])


__all__ = ["append_kv", "embed_mixed", "merge_states", "paged_attention", "pool_chunks", "project_chunks"]
