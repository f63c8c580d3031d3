"""A sequence with key/value slots: its passages with their places, and its text."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from refrag.model.inputs import Chunk, MixedPrompt


@dataclasses.dataclass(frozen=True)
class PlacedPassage:
    """A passage of a sequence.

    Attributes
    ----------
    chunks : tuple of Chunk
    keep : tuple of int
        Number of rows of each chunk in the sequence.
    place : int
        Position of its first token.
    """

    chunks: tuple[Chunk, ...]
    keep: tuple[int, ...]
    place: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens of each chunk."""
        return tuple(len(chunk.token_ids) for chunk in self.chunks)

    @property
    def rows(self) -> int:
        """Number of rows in the sequence."""
        return sum(self.keep)


@dataclasses.dataclass(frozen=True)
class TextSpan:
    """A text of a sequence.

    Attributes
    ----------
    token_ids, positions : tuple of int
    passages : int
        Number of passages of the sequence before it.
    """

    token_ids: tuple[int, ...]
    positions: tuple[int, ...]
    passages: int


@dataclasses.dataclass(frozen=True)
class SlotSequence:
    """The passages and the texts of a sequence, each in order."""

    passages: tuple[PlacedPassage, ...] = ()
    texts: tuple[TextSpan, ...] = ()

    @property
    def beginning(self) -> tuple[int, ...]:
        """Tokens of the text before the first passage, which every passage is read behind."""
        return tuple(token for text in self.texts if not text.passages for token in text.token_ids)

    def with_text(self, token_ids: Sequence[int], first: int) -> SlotSequence:
        """Return the sequence with a text at its end, whose first token has position ``first``."""
        positions = tuple(range(first, first + len(token_ids)))
        text = TextSpan(tuple(token_ids), positions, len(self.passages))
        return dataclasses.replace(self, texts=(*self.texts, text))

    def followed_by(self, other: SlotSequence) -> SlotSequence:
        """Return this sequence and another one after it."""
        before = len(self.passages)
        texts = (dataclasses.replace(text, passages=before + text.passages) for text in other.texts)
        return SlotSequence((*self.passages, *other.passages), (*self.texts, *texts))

    def expanded(self, chunks: Collection[int]) -> SlotSequence:
        """Return the sequence with some chunks, counted through its passages, whole."""
        passages, first = [], 0
        for passage in self.passages:
            lengths = passage.lengths
            keep = (lengths[i] if first + i in chunks else rows for i, rows in enumerate(passage.keep))
            passages.append(dataclasses.replace(passage, keep=tuple(keep)))
            first += len(lengths)
        return dataclasses.replace(self, passages=tuple(passages))


def sequences_of(prompt: MixedPrompt, start: int = 0) -> list[SlotSequence]:
    """Return the sequences of a prompt with key/value slots, whose positions begin at ``start``.

    Raises
    ------
    ValueError
        If a sequence has no text after its last passage, the chunks of a passage aren't adjacent, or a row doesn't
        have the position of its token.
    """
    token_ids, positions = prompt.token_ids.tolist(), prompt.position_ids.tolist()
    passage_of_span = iter(prompt.passage_of_span.tolist())
    result, row, chunk = [], 0, 0
    for index, lengths in enumerate(prompt.layout.lengths()):
        passages: list[list[int]] = []  # the chunks of each
        keep: list[list[int]] = []
        ends: list[list[int]] = []  # position of each chunk's last row
        texts: list[TextSpan] = []
        seen: dict[int, int] = {}  # a passage's id -> its number
        last = -1
        for rows in lengths:
            passage, rows_end = next(passage_of_span), row + rows
            if passage < 0:
                own = slice(row, rows_end)
                texts.append(TextSpan(tuple(token_ids[own]), tuple(start + p for p in positions[own]), len(passages)))
            else:
                if passage != last:
                    if passage in seen:
                        raise ValueError(
                            f"prompt: got passage {passage} of sequence {index} in two places, needs adjacent chunks"
                        )
                    seen[passage] = len(passages)
                    for part in (passages, keep, ends):
                        part.append([])
                passages[-1].append(chunk)
                keep[-1].append(rows)
                ends[-1].append(start + positions[rows_end - 1])
                chunk += 1
            last, row = passage, rows_end
        if last >= 0 or not texts:
            raise ValueError(
                f"prompt: sequence {index} ends with a passage or is empty, needs text after its passages: slots have "
                "no logits"
            )
        placed = [_placed(prompt, *parts, index) for parts in zip(passages, keep, ends)]
        result.append(SlotSequence(tuple(placed), tuple(texts)))
    return result


def _placed(prompt: MixedPrompt, chunks: list[int], keep: list[int], ends: list[int], index: int) -> PlacedPassage:
    passage = PlacedPassage(tuple(prompt.chunks[chunk] for chunk in chunks), tuple(keep), 0)
    lengths = passage.lengths
    place = end = ends[0] + 1 - lengths[0]
    for length, last in zip(lengths, ends, strict=True):
        end += length
        if last + 1 != end:
            raise ValueError(
                f"position_ids: got {last} for the last row of a chunk of sequence {index}, needs {end - 1}: with "
                "key/value slots, all tokens of a passage count"
            )
    return dataclasses.replace(passage, place=place)
