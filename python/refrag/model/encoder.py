"""The chunk encoder: all chunks of a batch in one packed pass, without padding or attention between chunks."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import refrag_kernels as rk
from refrag.model.acceptance import reading_of
from refrag.model.encoder_rows import first_position, packed_rows, padded_rows, position_table, window_of_text
from refrag.model.inputs import PackedTexts
from refrag_kernels import ChunkLayout


def pack_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    special_tokens: bool = True,
    truncate_to: int | None = None,
    window: int = 0,
    passages: Sequence[int] | None = None,
) -> PackedTexts:
    """Tokenize ``texts`` for the encoder and concatenate them.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The encoder's.
    texts : sequence of str
    special_tokens : bool
        Whether to put each text between the encoder's special tokens; a text without tokens always gets them.
    truncate_to : int, optional
        Truncate texts to this many tokens. Without it, a text that is too long is an error.
    window : int
        Tokens in a window, as ``encoder_window`` in RefragConfig; 0 encodes each text on its own.
    passages : sequence of int, optional
        Passage of each text; a window holds texts of one passage only. Without it, each text has its own window.

    Raises
    ------
    ValueError
        If a text has more tokens than the encoder has positions.
    """
    options: dict[str, Any] = {"add_special_tokens": special_tokens, "verbose": False}
    if truncate_to is not None:
        options |= {"truncation": True, "max_length": truncate_to}
    token_ids = tokenizer(list(texts), **options)["input_ids"] if texts else []
    if not all(token_ids):  # for example blank lines, which need an encoder row all the same
        token_ids = [ids or tokenizer("", add_special_tokens=True)["input_ids"] for ids in token_ids]
    lengths = [len(ids) for ids in token_ids]
    if lengths and max(lengths) > tokenizer.model_max_length:
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        raise ValueError(
            f"texts: text {longest} has {lengths[longest]} tokens for the encoder, needs at most "
            f"{tokenizer.model_max_length}; use a smaller k"
        )
    flat = torch.tensor([token for ids in token_ids for token in ids], dtype=torch.int64, device="cpu")
    windows = None if not window else _windows(lengths, passages or range(len(lengths)), window)
    return PackedTexts(flat, ChunkLayout.from_lengths([lengths]), windows)


def _windows(lengths: Sequence[int], passages: Sequence[int], most: int) -> torch.Tensor:
    """Return the window of each text: consecutive texts of a passage with at most ``most`` tokens, or a single text."""
    windows: list[int] = []
    rows, before, window = 0, None, -1
    for length, passage in zip(lengths, passages, strict=True):
        if passage != before or rows + length > most:
            window, rows, before = window + 1, 0, passage
        rows += length
        windows.append(window)
    return torch.tensor(windows, dtype=torch.int32, device="cpu")


class TextEmbedder:
    """Embeds each text on its own, as the model embeds chunks: input for selectors and policies.

    If the model encodes chunks in windows (``encoder_window``), the processor embeds a prompt's chunks in their windows
    and passes the embeddings to ``remember``.

    The last results are kept, so that the model needn't encode chunks again that a selector has embedded: pass
    ``embedder([chunk.text for chunk in prompt.chunks])`` as ``chunk_embeds``.

    Parameters
    ----------
    model : RefragForCausalLM
    tokenizer : PreTrainedTokenizerBase
        The encoder's.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._kept: dict[tuple[str, ...], torch.Tensor] = {}

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Return embeddings [N, d_enc]; texts longer than the encoder's positions are truncated."""
        wanted = tuple(texts)
        if wanted not in self._kept:
            packed = pack_texts(
                self.tokenizer,
                texts,
                special_tokens=self.model.config.encoder_special_tokens,
                truncate_to=min(self.tokenizer.model_max_length, most_tokens(self.model.encoder) or sys.maxsize),
            )
            with torch.no_grad():
                embeds = self.model.encode_chunks(packed)
            self._keep(wanted, embeds)
        return self._kept[wanted]

    def remember(self, texts: Sequence[str], embeds: torch.Tensor) -> None:
        """Store known embeddings, for example from a ``ChunkStore``, so that they aren't computed again.

        Parameters
        ----------
        texts : sequence of str
        embeds : Tensor [N, d_enc]
            Computed by the model's encoder.
        """
        encoder = self.model.encoder
        self._keep(tuple(texts), embeds.to(device=encoder.device, dtype=encoder.dtype))

    def _keep(self, texts: tuple[str, ...], embeds: torch.Tensor) -> None:
        # At least the question's and the prompt's texts must fit.
        self._kept = {**dict(list(self._kept.items())[-3:]), texts: embeds}


def encode_packed(encoder: PreTrainedModel, texts: PackedTexts, pooling: str, segments: int = 1) -> torch.Tensor:
    """Encode packed texts independently of each other (REFRAG, section 2: c_i = Enc(C_i)).

    An encoder that doesn't support packed rows (MPNet's position bias, for example) reads a padded batch with its own
    attention.

    Parameters
    ----------
    encoder : PreTrainedModel
        With attention "refrag", unless it reads padded batches.
    texts : PackedTexts
        N texts.
    pooling : {"first", "mean", "last", "concat"}
    segments : int
        ``pool_segments`` in RefragConfig.

    Returns
    -------
    Tensor [N, d_enc]

    Raises
    ------
    FamilyError
        If neither packed rows nor padded batches reproduce the encoder's rows.
    ValueError
        If a text, or a window, has more tokens than the encoder has positions.
    """
    if not texts.layout.num_chunks:
        width = encoder.config.get_text_config().hidden_size * (segments if pooling == "concat" else 1)
        return torch.zeros(0, width, dtype=encoder.dtype, device=encoder.device)
    _require_positions(encoder, texts)
    reading = reading_of(encoder)
    texts = texts.to(encoder.device)
    hidden = packed_rows(encoder, texts, causal=reading.causal) if reading.packed else padded_rows(encoder, texts)
    if pooling == "concat":
        return _pool_segments(hidden, texts.layout, segments)
    return rk.pool_chunks(hidden, texts.layout.chunk_offsets, pooling)


def most_tokens(encoder: PreTrainedModel) -> int | None:
    """Return how many tokens an encoder has positions for; None if its config doesn't say.

    The tokenizer may not know: many lack ``model_max_length``, and some rows of RoBERTa's table aren't positions.
    """
    table = position_table(encoder)
    if table is not None:
        return table.num_embeddings - first_position(encoder)
    positions = getattr(encoder.config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _require_positions(encoder: PreTrainedModel, texts: PackedTexts) -> None:
    most = most_tokens(encoder)
    if most is None or texts.layout.total_rows <= most:
        return
    lengths = texts.layout.lengths()[0]
    name = "text"
    if texts.windows is not None:
        name, texts_of = "window", zip(window_of_text(texts).tolist(), lengths, strict=True)
        lengths = [sum(length for _, length in own) for _, own in itertools.groupby(texts_of, lambda pair: pair[0])]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if lengths[longest] > most:
        raise ValueError(
            f"texts: {name} {longest} has {lengths[longest]} tokens for the encoder, needs at most {most}; use a "
            f"smaller {'encoder_window' if name == 'window' else 'k'}"
        )


def _pool_segments(hidden: torch.Tensor, layout: ChunkLayout, segments: int) -> torch.Tensor:
    """Split each chunk's rows into ``segments`` runs of nearly equal length and return their means [N, segments * d].

    If a chunk has fewer rows than that, they are repeated.
    """
    starts, lengths = layout.chunk_offsets[:-1].long(), layout.chunk_offsets.diff().long()
    stretched = lengths.clamp(min=segments)
    edges = torch.arange(segments, device=hidden.device) * stretched[:, None] // segments
    ends = stretched.cumsum(0)
    offsets = torch.cat([(edges + (ends - stretched)[:, None]).flatten(), ends[-1:]]).int()
    if min(map(min, layout.lengths())) < segments:
        chunk = torch.repeat_interleave(stretched)
        place = torch.arange(len(chunk), device=hidden.device) - (ends - stretched)[chunk]
        hidden = hidden[starts[chunk] + place * lengths[chunk] // stretched[chunk]]
    return rk.pool_chunks(hidden, offsets, "mean").unflatten(0, (-1, segments)).flatten(1)
