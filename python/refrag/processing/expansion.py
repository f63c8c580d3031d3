"""Determines which chunks to expand, from a fraction, a number, a list of chunks and passages, or a selector."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

import torch

from refrag.model.encoder import TextEmbedder
from refrag.model.inputs import Chunk, MixedPrompt
from refrag.model.packing import Span
from refrag.model.passage_rows import PassageEntry
from refrag.processing.selectors import AttentionSelector, Selector


def expanded_chunks(
    chunks: Sequence[Sequence[Chunk]],
    questions: Sequence[str],
    expand: float | Collection[int | str] | None,
    expand_count: int | Sequence[int] | None,
    selector: Selector | None,
    chunk_embeds: torch.Tensor | None = None,
) -> frozenset[int]:
    """Return the indices of the chunks to expand, counted through the batch; see ``RefragProcessor.__call__``.

    Parameters
    ----------
    chunks : sequence of sequences of Chunk
        Chunks of each prompt.
    questions : sequence of str
        Question of each prompt.
    expand, expand_count, selector
        As for ``RefragProcessor.__call__``.
    chunk_embeds : Tensor [N, d_enc], optional
        Known embeddings of the chunks, for selectors that use a ``TextEmbedder``.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid. The message names it.
    """
    _require_one(expand, expand_count)
    if isinstance(expand, str):
        raise TypeError(f"expand: got the string {expand!r}, needs a fraction or a collection of chunks and ids")
    if isinstance(expand, Collection):
        return _named(chunks, expand)
    if selector is None and expand not in (None, 0, 1) and 0 <= expand <= 1:
        raise ValueError(f"selector: got None, needs a Selector to expand {expand} of the chunks")
    counts = chunk_counts(chunks, expand, expand_count)
    expanded: set[int] = set()
    first = 0
    for index, (own, question, count) in enumerate(zip(chunks, questions, counts)):
        if selector is None:
            if count not in (None, 0, len(own)):
                raise ValueError(f"selector: got None, needs a Selector to expand {count} of the {len(own)} chunks")
            picks: Collection[int] = range(count or 0)
        else:
            embedder = getattr(selector, "embed", None)
            if chunk_embeds is not None and isinstance(embedder, TextEmbedder):
                embedder.remember([chunk.text for chunk in own], chunk_embeds[first : first + len(own)])
            picks = selector(question, own, count)
            _check_picks(picks, index, len(own), count)
        expanded.update(first + pick for pick in picks)
        first += len(own)
    return frozenset(expanded)


def attention_picks(
    selector: AttentionSelector,
    prompt: MixedPrompt,
    chunks: Sequence[Sequence[Chunk]],
    expand: float | Collection[int | str] | None,
    expand_count: int | Sequence[int] | None,
    begin: bool,
) -> tuple[set[int], tuple[PassageEntry, ...] | None]:
    """Return the chunks that an AttentionSelector picks in a packed prompt, and the rows of its passages.

    Raises
    ------
    ValueError
        If the prompt has no key/value slots or doesn't begin a sequence, or an argument is invalid; names it.
    """
    if prompt.kv_slots is None:
        raise ValueError("selector: got AttentionSelector, needs a processor with kv_slots")
    if not begin:
        raise ValueError("selector: got AttentionSelector with begin=False, needs a prompt that begins a sequence")
    if isinstance(expand, Collection):
        raise ValueError(f"expand: got {expand!r} with AttentionSelector, needs a fraction")
    picked, prompt = selector.pick(prompt, chunk_counts(chunks, expand, expand_count))
    return picked, prompt.passages


def whole_chunks(sequences: Sequence[Sequence[Span]], count: int) -> set[int]:
    """Return the last ``count`` chunks of each passage, counted through the batch."""
    found: set[int] = set()
    chunk = 0
    for spans in sequences:
        for _, group in itertools.groupby(spans, key=lambda span: span[0]):
            own = [chunk + index for index, (_, span) in enumerate(group) if isinstance(span, Chunk)]
            chunk += len(own)
            found.update(own[max(len(own) - count, 0) :])
    return found


def _named(chunks: Sequence[Sequence[Chunk]], names: Collection[int | str]) -> frozenset[int]:
    flat = [chunk for own in chunks for chunk in own]
    expanded: set[int] = set()
    for name in names:
        if isinstance(name, str):
            own = [index for index, chunk in enumerate(flat) if chunk.passage == name]
            if not own:
                ids = ", ".join(dict.fromkeys(repr(chunk.passage) for chunk in flat if chunk.passage is not None))
                raise ValueError(
                    f"expand: got passage {name!r}, needs one of the prompts' passages: {ids or 'none has an id'}"
                )
            expanded.update(own)
        elif not isinstance(name, int) or not 0 <= name < len(flat):
            needs = f"0 to {len(flat) - 1}" if flat else "none: there are no passages"
            raise ValueError(f"expand: got chunk {name}, needs {needs}")
        else:
            expanded.add(name)
    return frozenset(expanded)


def _require_one(expand: float | Collection[int | str] | None, expand_count: int | Sequence[int] | None) -> None:
    if expand is not None and expand_count is not None:
        raise ValueError(f"expand_count: got {expand_count} with expand = {expand}, needs one of the two")


def chunk_counts(
    chunks: Sequence[Sequence[Chunk]], expand: float | None, expand_count: int | Sequence[int] | None
) -> Sequence[int | None]:
    """Return how many chunks to pick in each prompt; None lets the selector decide.

    Raises
    ------
    ValueError
        If a fraction or a number is out of range.
    """
    _require_one(expand, expand_count)
    if expand is not None:
        if not 0 <= expand <= 1:
            raise ValueError(f"expand: got {expand}, needs a fraction from 0 to 1")
        return [round(expand * len(own)) for own in chunks]
    if expand_count is None:
        return [None] * len(chunks)
    counts = [expand_count] * len(chunks) if isinstance(expand_count, int) else list(expand_count)
    if len(counts) != len(chunks):
        raise ValueError(f"expand_count: got {len(counts)} numbers, needs {len(chunks)}, one for each prompt")
    for index, (own, count) in enumerate(zip(chunks, counts)):
        if not 0 <= count <= len(own):
            raise ValueError(f"expand_count: got {count} for prompt {index}, needs 0 to {len(own)}, its chunks")
    return counts


def _check_picks(picks: Collection[int], prompt: int, chunks: int, count: int | None) -> None:
    wrong = next((pick for pick in picks if not 0 <= pick < chunks), None)
    if wrong is not None:
        raise ValueError(f"selector: picked chunk {wrong} of prompt {prompt}, needs 0 to {chunks - 1}")
    if len(set(picks)) < len(picks):
        raise ValueError(f"selector: picked a chunk of prompt {prompt} twice, needs each once")
    if count is not None and len(picks) > count:
        raise ValueError(f"selector: picked {len(picks)} chunks of prompt {prompt}, needs at most {count}")
