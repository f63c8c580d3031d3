"""Cutting a passage into chunks."""

from __future__ import annotations

import bisect
import re
import unicodedata
from collections.abc import Sequence
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from refrag.model.inputs import Chunk, require_text


class Chunker(Protocol):
    """Cuts a text into chunks; every character of the text is in exactly one of them, in order.

    For a ``ChunkStore`` it also needs ``description``, a string that holds its rule and settings.
    """

    def __call__(self, text: str) -> list[Chunk]: ...


def describe_chunker(chunker: Chunker) -> str:
    """Return a chunker's rule in words.

    Raises
    ------
    ValueError
        If it has none.
    """
    description = getattr(chunker, "description", None)
    if not isinstance(description, str) or not description:
        raise ValueError(
            f"chunker: {type(chunker).__name__} has no description, needs a string attribute of that name with its "
            "rule and settings: chunks that were cut otherwise must not be taken for its own"
        )
    return description


class FixedChunks:
    """Chunks of k decoder tokens (REFRAG, section 2); a passage's last chunk may be shorter.

    A character that the tokenizer splits into several tokens (an emoji under a byte-level tokenizer) is never split
    between two chunks, nor is a letter and its marks where the tokenizer normalizes them (to NFC, say): the chunk ends
    before it, or, where it alone has more than k tokens, after it. So a chunk's tokens and its text always stand for
    the same characters, and the encoder never sees half a character.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The decoder's; a fast one, because offsets are needed.
    k : int
        Tokens of a chunk, 1 or more.

    Raises
    ------
    ValueError
        If k is below 1 or the tokenizer gives no offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, k: int) -> None:
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ValueError(f"k: got {k!r}, needs an integer of 1 or more")
        _require_offsets(tokenizer)
        self.tokenizer = tokenizer
        self.k = k

    @property
    def description(self) -> str:
        """The rule in words: what chunks depend on besides the text and the tokenizer."""
        return f"fixed, k = {self.k}"

    def __call__(self, text: str) -> list[Chunk]:
        (tokens,) = tokenize(self.tokenizer, [text])
        chunks, first = [], 0
        while first < len(tokens):
            chunks.append(tokens.chunk(first, end := end_of_chunk(tokens.cuttable, first, self.k)))
            first = end
        return chunks


# Words, or what counts as one: Chinese, Japanese and Korean are written without spaces.
_WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\\s\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_CLOSING = "\"')]\u2019\u201d\u00bb"  # may follow the end of a sentence or clause
_SENTENCE_ENDS = tuple(".!?\u2026")
_WIDE_SENTENCE_ENDS = tuple("\u3002\uff01\uff1f")
_CLAUSE_ENDS = tuple(",;:\u2013\u2014\u3001\uff0c\uff1b")
# A full stop after these, or after a single letter, ends no sentence.
_ABBREVIATIONS = frozenset(
    "al. cf. ch. dr. e.g. ed. eq. etc. fig. i.e. mr. mrs. ms. no. p. pp. prof. sec. st. vol. vs.".split()
)


class SentenceChunks:
    """Chunks of whole sentences, packed to 16 to 32 words: the size that the paper's authors wish for chunks of text.

    Sentences join a chunk until it has ``min_words``; one that fits into ``max_words`` is never split. A longer one is
    cut at the last end of a clause or line that leaves a piece of ``min_words`` to ``max_words``, else after
    ``max_words``. A chunk is shorter where the next sentence would make it too long, and at the end. The tokens are
    those of the whole passage: a cut that would fall into a token, or into a character of several, moves behind it.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The decoder's; a fast one, because offsets are needed.
    min_words, max_words : int
    max_tokens : int
        No chunk has more decoder tokens, whatever its words are: a line of base64 is one word.

    Raises
    ------
    ValueError
        If a number is below 1, ``min_words`` is above ``max_words``, or the tokenizer gives no offsets.

    Examples
    --------
    >>> from transformers import AutoTokenizer
    >>> from refrag import weights
    >>> cut = SentenceChunks(AutoTokenizer.from_pretrained(weights.decoder_folder()), 4, 8)
    >>> [chunk.text for chunk in cut("It rained. Dr. Orla stayed in. She read all day.")]
    ['It rained. Dr. Orla stayed in.', ' She read all day.']
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, min_words: int = 16, max_words: int = 32, *, max_tokens: int = 128
    ) -> None:
        if not 1 <= min_words <= max_words:
            raise ValueError(f"min_words, max_words: got {min_words}, {max_words}, needs 1 <= min_words <= max_words")
        if max_tokens < 1:
            raise ValueError(f"max_tokens: got {max_tokens}, needs 1 or more")
        _require_offsets(tokenizer)
        self.tokenizer = tokenizer
        self.min_words = min_words
        self.max_words = max_words
        self.max_tokens = max_tokens

    @property
    def description(self) -> str:
        """The rule in words: what chunks depend on besides the text and the tokenizer."""
        return f"sentence, {self.min_words} to {self.max_words} words, at most {self.max_tokens} tokens"

    def __call__(self, text: str) -> list[Chunk]:
        (tokens,) = tokenize(self.tokenizer, [text])
        chunks, first = [], 0
        for end in [*self._ends(text), len(text)]:
            last = tokens.end_of_text(end)
            while first < last:
                stop = min(end_of_chunk(tokens.cuttable, first, self.max_tokens), last)
                chunks.append(tokens.chunk(first, stop))
                first = stop
        return chunks

    def _ends(self, text: str) -> list[int]:
        """Return where chunks end in the text, all but the last."""
        words = list(_WORD.finditer(text))
        sentences, clauses = _boundaries(text, words)
        ends, first, last = [], 0, 0  # words [first, last) are whole sentences of the chunk that is being filled
        for end in sentences:
            if last > first and end - first > self.max_words:
                ends.append(last)
                first = last
            while end - first > self.max_words:
                # The last clause within reach: there may be as many as words.
                place = bisect.bisect_right(clauses, first + self.max_words) - 1
                fits = place >= 0 and clauses[place] >= first + self.min_words
                first = clauses[place] if fits else first + self.max_words
                ends.append(first)
            last = end
            if last - first >= self.min_words:
                ends.append(last)
                first = last
        # The last chunk goes on to the end of the text.
        return [words[end - 1].end() for end in ends if end < len(words)]


def _boundaries(text: str, words: list[re.Match[str]]) -> tuple[list[int], list[int]]:
    """Return after how many words sentences end, and clauses or lines."""
    sentences, clauses = [], []
    for index, word in enumerate(words, 1):
        if index == len(words):
            sentences.append(index)
            break
        between = text[word.end() : words[index].start()]
        if between.count("\n") > 1:
            sentences.append(index)
        elif _ends_sentence(word[0], between, words[index][0]):
            sentences.append(index)
        elif "\n" in between or _ends_clause(word[0]):
            clauses.append(index)
    return sentences, clauses


def _ends_sentence(word: str, between: str, following: str) -> bool:
    if word.endswith(_WIDE_SENTENCE_ENDS):
        return True
    if not word.rstrip(_CLOSING).endswith(_SENTENCE_ENDS):
        return False
    bare = word.lstrip("(\"'\u201c\u2018").lower()
    if bare in _ABBREVIATIONS or re.fullmatch(r"\w\.", bare):
        return False
    return bool(between) and not following[0].islower()


def _ends_clause(word: str) -> bool:
    return word.endswith(")") or word.rstrip(_CLOSING).endswith(_CLAUSE_ENDS)


class TokenizedText:
    """A text's tokens, and where they may be parted.

    Attributes
    ----------
    ids : list of int
    cuttable : list of bool
        For each token, whether a chunk may end with it.
    """

    def __init__(
        self, text: str, ids: list[int], offsets: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        normalizer = tokenizer.backend_tokenizer.normalizer
        moved = normalizer is not None and not text.isascii() and normalizer.normalize_str(text) != text
        self.text = text
        self.ids = ids
        self._reached, self.cuttable = _places_to_cut(text, offsets, moved)

    def __len__(self) -> int:
        return len(self.ids)

    def end_of_text(self, end: int) -> int:
        """Return the first place to cut at which the text up to ``end`` is complete."""
        last = bisect.bisect_left(self._reached, end)
        while last < len(self) and not self.cuttable[last]:
            last += 1
        return min(last + 1, len(self))

    def chunk(self, first: int, end: int) -> Chunk:
        """Return tokens [first, end) with their text; what no token stands for goes to the last."""
        text_start = self._reached[first - 1] if first else 0
        text_end = len(self.text) if end == len(self) else self._reached[end - 1]
        return Chunk(self.text[text_start:text_end], tuple(self.ids[first:end]))


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[TokenizedText]:
    """Tokenize texts for the decoder.

    Raises
    ------
    TypeError
        If one is no string.
    ValueError
        If one holds half a surrogate pair, or the tokenizer gives no offsets.
    """
    _require_offsets(tokenizer)
    for text in texts:
        require_text(text, "text")
    # A passage that spells out "<|im_end|>" must not end the message it stands in.
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True, verbose=False
    )
    return [
        TokenizedText(text, ids, offsets, tokenizer)
        for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"])
    ]


def end_of_chunk(cuttable: Sequence[bool], first: int, count: int) -> int:
    """Return where a chunk that starts at token ``first`` ends: ``count`` tokens on, or as near as it can be cut.

    Examples
    --------
    >>> cuttable = [True, False, False, True, True]  # tokens 1 to 3 are one character
    >>> [end_of_chunk(cuttable, first, 2) for first in (0, 1, 4)]
    [1, 4, 5]
    """
    last = min(first + count, len(cuttable)) - 1
    within = last
    while within >= first and not cuttable[within]:
        within -= 1
    if within < first:
        within = last
        while within < len(cuttable) - 1 and not cuttable[within]:
            within += 1
    return within + 1


def _places_to_cut(text: str, offsets: Sequence[tuple[int, int]], moved: bool) -> tuple[list[int], list[bool]]:
    """Return where the text of tokens 0..i ends, and whether it may be cut there, for each token i.

    ``moved``: whether a normalizer has changed the text. It may have composed a letter with its marks, put the marks
    into another order or dropped them; offsets then lie within the letter with its marks, or leave the marks to no
    token.
    """
    reached: list[int] = []
    end = 0
    starts = [start for start, _ in offsets[1:]] + [len(text)]
    for (_, token_end), next_start in zip(offsets, starts):
        end = max(end, token_end)
        while moved and end < next_start and _goes_on(text, end):
            end += 1
        reached.append(end)
    # Not where the next token starts inside a character that has already begun.
    cuttable = [start >= end and not (moved and _goes_on(text, end)) for end, start in zip(reached, starts)]
    return reached, [*cuttable[:-1], True] if cuttable else []


def _goes_on(text: str, place: int) -> bool:
    """Whether a character goes on at a place: a mark that belongs to the letter before it, or what composes with it."""
    if not 0 < place < len(text) or (letter := text[place]) < "\u0300":
        return False
    if unicodedata.combining(letter) or "\u1160" <= letter <= "\u11ff":  # the vowels and finals of Korean syllables
        return True
    return len(unicodedata.normalize("NFC", text[place - 1 : place + 1])) == 1


def _require_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer: got {type(tokenizer).__name__}, needs a fast tokenizer, which gives offsets")
