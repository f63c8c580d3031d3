"""Converts a request's passages to what the decoder reads: which rows are text, and the encoder's input for slots.

Works without vLLM.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from refrag import deprecated
from refrag.integrations.vllm.passages import GivenPassage
from refrag.model.encoder import TextEmbedder, pack_texts
from refrag.model.inputs import Chunk, PackedTexts, Passage
from refrag.processing import selectors
from refrag.processing.expansion import expanded_chunks
from refrag.processing.processor import RefragProcessor
from refrag.store.store import ChunkStore

# Options of a request and their types. JSON numbers may arrive as int or float.
_OPTIONS: dict[str, tuple[type, ...]] = {
    "expand": (int, float, list, tuple),
    "expand_count": (int,),
    "selector": (str,),
    "question": (str,),
    "threshold": (int, float),
    "seed": (int,),
}
# Selectors that need no decoder, since the process that parses requests has none.
_SELECTORS = ("nothing", "everything", "random", "cosine", "threshold")


@dataclasses.dataclass(frozen=True)
class ReadPassage:
    """A passage as the decoder reads it; returned by ``read_passages``.

    Attributes
    ----------
    token_ids : list of int
        Token of each row; 0 for slots.
    is_slot : list of bool
        Which rows are slots: ``latents`` (from the config) for each of the n compressed chunks.
    encoder_ids : Tensor, int64 [R]
        The encoder's input tokens, chunk by chunk; empty if the embeddings are known.
    encoder_lengths : Tensor, int64 [N]
        Number of encoder tokens of each chunk to encode: the compressed chunks, or, with windows, all chunks.
    encoder_windows : Tensor, int64 [N]
        Window of each of these chunks; those of one window are encoded together.
    encoder_slots : Tensor, uint8 [N]
        Which of these chunks are compressed.
    embeds : Tensor [n, d_enc]
        Embeddings of the compressed chunks; [0, d_enc] if the encoder has to compute them.
    """

    token_ids: list[int]
    is_slot: list[bool]
    encoder_ids: torch.Tensor
    encoder_lengths: torch.Tensor
    encoder_windows: torch.Tensor
    encoder_slots: torch.Tensor
    embeds: torch.Tensor

    def content(self) -> dict[str, Any]:
        """Return everything that the passage's rows depend on, for hashing."""
        return {
            "token_ids": torch.tensor(self.token_ids, dtype=torch.int64, device="cpu"),
            "is_slot": torch.tensor(self.is_slot, dtype=torch.uint8, device="cpu"),
            "encoder_ids": self.encoder_ids,
            "encoder_lengths": self.encoder_lengths,
            "encoder_windows": self.encoder_windows,
            "encoder_slots": self.encoder_slots,
            "embeds": self.embeds,
        }


@dataclasses.dataclass(frozen=True)
class _CutPassage:
    """The chunks of a passage, and their embeddings if known. Chunks of a passage without text have no tokens."""

    chunks: list[Chunk]
    embeds: torch.Tensor | None


def read_passages(
    given: Sequence[GivenPassage],
    processor: RefragProcessor,
    width: int,
    options: Mapping[str, Any] | None = None,
    store: ChunkStore | None = None,
    embedder: Callable[[], TextEmbedder] | None = None,
) -> list[ReadPassage]:
    """Cut the passages of one request into chunks, and select the chunks to expand to text.

    Parameters
    ----------
    given : sequence of GivenPassage
    processor : RefragProcessor
    width : int
        d_enc.
    options : dict, optional
        The request's options, as for ``RefragProcessor.__call__``: "expand" (a fraction, or a list of passage ids and
        chunk numbers, counted over the whole request), "expand_count", "selector" (nothing, everything, random, cosine,
        threshold), "question" for cosine and threshold, "threshold", "seed" for random. Chunks without text, for which
        only embeddings are given, always stay slots and are not passed to selectors.
    store : ChunkStore, optional
        Provides passages without text by their id, and embeddings of passages with text.
    embedder : callable, optional
        Returns the embedder; called if cosine or threshold has to compare texts.

    Raises
    ------
    ValueError
        If a passage or an option is invalid. The message names it.
    """
    options = _checked(options or {})
    cut = [_cut(passage, index, processor, store) for index, passage in enumerate(given)]
    expanded = _expanded(cut, options, processor, embedder)
    read, first = [], 0
    for passage in cut:
        last = first + len(passage.chunks)
        own = {chunk - first for chunk in expanded if first <= chunk < last}
        read.append(_read(passage, own, processor, width))
        first = last
    return read


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    if "chooser" in options:
        if "selector" in options:
            raise ValueError("chooser: got it together with selector, which replaces it; pass selector alone")
        deprecated.warn_renamed_key("chooser", "selector")
        options = {"selector" if option == "chooser" else option: value for option, value in options.items()}
    for option, value in options.items():
        if option not in _OPTIONS:
            raise ValueError(f"mm_processor_kwargs: got {option!r}, needs some of {', '.join(_OPTIONS)}")
        if value is not None and type(value) not in _OPTIONS[option]:  # isinstance would take True for 1
            kinds = " or ".join(kind.__name__ for kind in _OPTIONS[option])
            raise ValueError(f"{option}: got {type(value).__name__}, needs {kinds}")
    chosen = {option: value for option, value in options.items() if value is not None}
    names = chosen.get("expand")
    if isinstance(names, (list, tuple)) and not all(type(name) in (int, str) for name in names):
        raise ValueError("expand: got a list with other items, needs chunk numbers and passage ids")
    if chosen.get("selector", "nothing") not in _SELECTORS:
        raise ValueError(
            f"selector: got {chosen['selector']!r}, needs one of {', '.join(_SELECTORS)}, "
            "or expand with a list of chunks"
        )
    if chosen.get("selector") in ("cosine", "threshold") and "question" not in chosen:
        raise ValueError(f"question: got None, but the selector {chosen['selector']!r} needs it")
    return chosen


def _cut(passage: GivenPassage, index: int, processor: RefragProcessor, store: ChunkStore | None) -> _CutPassage:
    if passage.embeds is not None and not passage.text:
        return _CutPassage([Chunk("", (), passage.id)] * len(passage.embeds), passage.embeds)
    wanted = Passage(passage.text, passage.id)
    if passage.embeds is None and store is not None and (_holds(store, wanted) or not passage.text):
        return _CutPassage(_named(store.chunks([wanted])[0], passage.id), store.get(wanted))
    if not passage.text:
        raise ValueError(f"passage {index}: id: got {passage.id!r} without text, needs a server with a chunk store")
    chunks = _named(processor.chunker(passage.text), passage.id)
    if passage.embeds is not None and len(chunks) != len(passage.embeds):
        raise ValueError(
            f"passage {index}: embeds: got {len(passage.embeds)} rows, needs {len(chunks)}, one for each chunk"
        )
    return _CutPassage(chunks, passage.embeds)


def _holds(store: ChunkStore, passage: Passage) -> bool:
    # Look for passages that other processes have added, but only if one is missing.
    return passage in store or (not passage.text and bool(store.refresh()) and passage in store)


def _named(chunks: Sequence[Chunk], passage: str | None) -> list[Chunk]:
    return [dataclasses.replace(chunk, passage=passage) for chunk in chunks]


def _expanded(
    cut: Sequence[_CutPassage],
    options: dict[str, Any],
    processor: RefragProcessor,
    embedder: Callable[[], TextEmbedder] | None,
) -> frozenset[int]:
    """Return which of the request's chunks to expand to text."""
    chunks = [chunk for passage in cut for chunk in passage.chunks]
    expand, name = options.get("expand"), options.get("selector")
    if isinstance(expand, (list, tuple)):
        if name is not None:
            raise ValueError(f"selector: got {name!r} with a list of chunks to expand, needs one of the two")
        expanded = expanded_chunks([chunks], [""], expand, options.get("expand_count"), None)
        bare = sorted(chunk for chunk in expanded if not chunks[chunk].token_ids)
        if bare:
            raise ValueError(f"expand: got chunk {bare[0]}, which has an embedding but no text, needs one with text")
        return expanded
    with_text = [number for number, chunk in enumerate(chunks) if chunk.token_ids]
    selector = embed = embeds = None
    if name in ("cosine", "threshold") and embedder is not None:
        embed = embedder()
        if processor.encoder_window:  # encode each chunk with its neighbours, as the model does
            passages = [index for index, passage in enumerate(cut) for _ in passage.chunks]
            texts = _packed(processor, [chunks[i].text for i in with_text], [passages[i] for i in with_text])
            with torch.no_grad():
                embeds = embed.model.encode_chunks(texts)
    if name is not None:
        selector = selectors.by_name(name, embed=embed, threshold=options.get("threshold"), seed=options.get("seed", 0))
    picks = expanded_chunks(
        [[chunks[number] for number in with_text]],
        [options.get("question", "")],
        expand,
        options.get("expand_count"),
        selector,
        embeds,
    )
    return frozenset(with_text[pick] for pick in picks)


def _read(passage: _CutPassage, expanded: set[int], processor: RefragProcessor, width: int) -> ReadPassage:
    token_ids: list[int] = []
    is_slot: list[bool] = []
    for number, chunk in enumerate(passage.chunks):
        own = chunk.token_ids if number in expanded else (0,) * processor.latents
        token_ids += own
        is_slot += [number not in expanded] * len(own)
    compressed = [number for number in range(len(passage.chunks)) if number not in expanded]
    if passage.embeds is not None or not compressed:
        nothing = torch.zeros(0, dtype=torch.int64, device="cpu")
        known = torch.zeros(0, width, device="cpu") if passage.embeds is None else passage.embeds[compressed]
        return ReadPassage(token_ids, is_slot, nothing, nothing, nothing, nothing.to(torch.uint8), known)
    # With windows, the encoder reads expanded neighbours too.
    numbers = range(len(passage.chunks)) if processor.encoder_window else compressed
    texts = _packed(processor, [passage.chunks[number].text for number in numbers], [0] * len(numbers))
    lengths = texts.layout.chunk_offsets.diff().long()
    windows = torch.arange(len(numbers), device="cpu") if texts.windows is None else texts.windows.long()
    slots = torch.tensor([number not in expanded for number in numbers], dtype=torch.uint8, device="cpu")
    return ReadPassage(
        token_ids, is_slot, texts.token_ids, lengths, windows, slots, torch.zeros(0, width, device="cpu")
    )


def _packed(processor: RefragProcessor, texts: Sequence[str], passages: Sequence[int]) -> PackedTexts:
    return pack_texts(
        processor.encoder_tokenizer,
        texts,
        special_tokens=processor.encoder_special_tokens,
        window=processor.encoder_window,
        passages=passages,
    )
