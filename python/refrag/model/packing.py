"""Packs spans, the text and the chunks of each sequence, into the rows of a MixedPrompt."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import cast

import torch
from transformers import PreTrainedTokenizerBase

from refrag.model.encoder import pack_texts
from refrag.model.inputs import Chunk, MixedPrompt, PackedTexts
from refrag.model.passage_rows import PassageEntry, SlotRule
from refrag_kernels import ChunkLayout

# The index of the passage in its sequence, or -1 for text; and the chunk, or the text's tokens.
Span = tuple[int, list[int] | Chunk]


def pack_spans(
    sequences: Sequence[Sequence[Span]],
    expanded: Collection[int],
    encoder_tokenizer: PreTrainedTokenizerBase,
    *,
    position_ids: str = "contiguous",
    encoder_special_tokens: bool = True,
    chunk_embeds: torch.Tensor | None = None,
    latents: int = 1,
    encoder_window: int = 0,
    kv_slots: SlotRule | None = None,
    passages: Sequence[PassageEntry] | None = None,
) -> MixedPrompt:
    """Pack a batch into a MixedPrompt.

    Parameters
    ----------
    sequences : sequence of sequences of Span
    expanded : collection of int
        Indices of the chunks to expand, counted through the batch; the others become slots.
    encoder_tokenizer : PreTrainedTokenizerBase
    position_ids : {"contiguous", "original", "parallel"}
    encoder_special_tokens : bool
        Both as in RefragConfig.
    chunk_embeds : Tensor [N, d_enc], optional
        The chunks' embeddings if they are known; the chunks aren't tokenized for the encoder then.
    latents : int
        Number of slots of a compressed chunk.
    encoder_window : int
        Number of encoder tokens in a window.
    kv_slots : SlotRule, optional
        For slots of keys and values, in place of ``latents``; nothing is tokenized for the encoder then.
    passages : sequence of PassageEntry, optional
        With ``kv_slots``: keys and values of the passages if they are known.

    Returns
    -------
    MixedPrompt

    Examples
    --------
    >>> from transformers import AutoTokenizer
    >>> from refrag import weights
    >>> tokenizer = AutoTokenizer.from_pretrained(weights.encoder_folder())
    >>> spans = [(-1, [11, 12]), (0, Chunk("built in", (21, 22))), (0, Chunk(" 1871", (23, 24, 25)))]
    >>> prompt = pack_spans([spans], {1}, tokenizer)
    >>> prompt.token_ids.tolist(), prompt.slot_of_row.tolist()
    ([11, 12, 0, 23, 24, 25], [-1, -1, 0, -1, -1, -1])
    """
    latents = latents if kv_slots is None else kv_slots.rows
    token_ids: list[int] = []
    slots: list[int] = []
    positions: list[int] = []
    lengths: list[list[int]] = []
    passage_of_span: list[int] = []
    chunks: list[Chunk] = []
    for spans in sequences:
        lengths.append([])
        position = furthest = start = 0
        before = -1
        for passage, span in spans:
            if position_ids == "parallel" and passage != before:
                # Adjacent passages start at the same position; text continues after the longest of them.
                start = start if before >= 0 and passage >= 0 else furthest
                position, before = start, passage
            own_tokens = span.token_ids if isinstance(span, Chunk) else span
            slot = -1
            if isinstance(span, Chunk):
                slot = -1 if len(chunks) in expanded else len(chunks)
                chunks.append(span)
            rows = latents if slot >= 0 else len(own_tokens)
            if kv_slots is not None:
                rows = min(rows, len(own_tokens))
            token_ids += [0] * rows if slot >= 0 else own_tokens
            slots += [slot * latents + latent for latent in range(rows)] if slot >= 0 else [-1] * rows
            if slot >= 0 and (position_ids == "original" or kv_slots is not None):
                position += max(len(own_tokens) - rows, 0)
            positions += range(position, position + rows)
            position += rows
            furthest = max(furthest, position)
            lengths[-1].append(rows)
            passage_of_span.append(passage)
    return MixedPrompt(
        token_ids=torch.tensor(token_ids, dtype=torch.int64, device="cpu"),
        slot_of_row=torch.tensor(slots, dtype=torch.int32, device="cpu"),
        position_ids=torch.tensor(positions, dtype=torch.int64, device="cpu"),
        layout=ChunkLayout.from_lengths(lengths),
        passage_of_span=torch.tensor(passage_of_span, dtype=torch.int32, device="cpu"),
        chunks=tuple(chunks),
        expanded=frozenset(expanded),
        encoder_input=pack_chunks(
            [] if chunk_embeds is not None or kv_slots is not None else sequences,
            encoder_tokenizer,
            special_tokens=encoder_special_tokens,
            window=encoder_window,
        ),
        chunk_embeds=chunk_embeds,
        latents=latents,
        kv_slots=kv_slots,
        passages=None if passages is None else tuple(passages),
    )


def pack_chunks(
    sequences: Sequence[Sequence[Span]],
    encoder_tokenizer: PreTrainedTokenizerBase,
    *,
    special_tokens: bool = True,
    window: int = 0,
) -> PackedTexts:
    """Tokenize the chunks of a batch for the encoder.

    Parameters
    ----------
    sequences : sequence of sequences of Span
    encoder_tokenizer : PreTrainedTokenizerBase
    special_tokens : bool
    window : int
        Number of encoder tokens in a window.

    Returns
    -------
    PackedTexts
    """
    texts, passages = [], []
    numbers: dict[tuple[int, int], int] = {}
    for index, spans in enumerate(sequences):
        for passage, span in spans:
            if isinstance(span, Chunk):
                texts.append(span.text)
                passages.append(numbers.setdefault((index, passage), len(numbers)))
    return pack_texts(encoder_tokenizer, texts, special_tokens=special_tokens, window=window, passages=passages)


def shared_tokens(spans: Sequence[Span]) -> list[int]:
    """Return the tokens before the first passage."""
    texts = itertools.takewhile(lambda span: not isinstance(span, Chunk), (span for _, span in spans))
    return [token for text in texts for token in cast(list[int], text)]
