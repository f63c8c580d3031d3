"""Chunkers, which split a passage into chunks."""

from __future__ import annotations

import bisect
import re
import unicodedata
from collections.abc import Sequence
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from refrag.model.inputs import Chunk, require_text


class Chunker(Protocol):
    """Splits a text into consecutive chunks, so that each character of the text is in exactly one chunk.

    A ``ChunkStore`` also needs a string attribute ``description`` that states the chunker's rule and settings.
    """

    def __call__(self, text: str) -> list[Chunk]: ...


def describe_chunker(chunker: Chunker) -> str:
    """Return a chunker's description of its rule and settings.

    Raises
    ------
    ValueError
        If it has no description.
    """
    description = getattr(chunker, "description", None)
    if not isinstance(description, str) or not description:
        raise ValueError(
            f"chunker: {type(chunker).__name__} has no description, needs a string attribute of that name with its "
            "rule and settings, which distinguishes its chunks from others"
        )
    return description


class FixedChunks:
    """Splits into chunks of k decoder tokens (REFRAG, section 2); a passage's last chunk may be shorter.

    Characters are never split between two chunks, even if they consist of several tokens (an emoji under a byte-level
    tokenizer); nor are a letter and its combining marks if the tokenizer normalizes them (to NFC, for example). The
    chunk ends before such a character, or after it if the character alone has more than k tokens. A chunk's tokens and
    text therefore always represent the same characters, and the encoder never reads a partial character.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The decoder's tokenizer, which must be a fast one, because offsets are needed.
    k : int
        Number of tokens in a chunk, at least 1.

    Raises
    ------
    ValueError
        If k is below 1 or the tokenizer doesn't provide offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, k: int) -> None:
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ValueError(f"k: got {k!r}, needs an integer of 1 or more")
        _require_offsets(tokenizer)
        self.tokenizer = tokenizer
        self.k = k

    @property
    def description(self) -> str:
        """Everything that chunks depend on besides the text and the tokenizer."""
        return f"fixed, k = {self.k}"

    def __call__(self, text: str) -> list[Chunk]:
        (tokens,) = tokenize(self.tokenizer, [text])
        chunks, first = [], 0
        while first < len(tokens):
            chunks.append(tokens.chunk(first, end := end_of_chunk(tokens.cuttable, first, self.k)))
            first = end
        return chunks


# Words; each character of Chinese, Japanese and Korean, which are written without spaces, counts as one.
_WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\\s\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_CLOSING = "\"')]\u2019\u201d\u00bb"  # closing characters that may follow the end of a sentence or clause
_SENTENCE_ENDS = tuple(".!?\u2026")
_WIDE_SENTENCE_ENDS = tuple("\u3002\uff01\uff1f")
_CLAUSE_ENDS = tuple(",;:\u2013\u2014\u3001\uff0c\uff1b")
# A full stop after one of these, or after a single letter, doesn't end a sentence.
_ABBREVIATIONS = frozenset(
    "al. cf. ch. dr. e.g. ed. eq. etc. fig. i.e. mr. mrs. ms. no. p. pp. prof. sec. st. vol. vs.".split()
)


class SentenceChunks:
    """Splits into chunks of whole sentences with 16 to 32 words, the size that the paper's authors recommend for text.

    Sentences are added to a chunk until it has ``min_words``. A sentence of up to ``max_words`` is never split. A
    longer one is split at the last end of a clause or line that leaves a piece of ``min_words`` to ``max_words``,
    otherwise after ``max_words``. A chunk is shorter if the next sentence would exceed ``max_words``, and at the end of
    the passage. The passage is tokenized as a whole: a boundary within a token, or within a character of several
    tokens, moves to its end.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The decoder's tokenizer, which must be a fast one, because offsets are needed.
    min_words, max_words : int
    max_tokens : int
        Maximum number of decoder tokens in a chunk, regardless of words: a line of base64 is one word.

    Raises
    ------
    ValueError
        If a number is below 1, ``min_words`` is above ``max_words``, or the tokenizer doesn't provide offsets.

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
        """Everything that chunks depend on besides the text and the tokenizer."""
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
        """Return the ends of all chunks but the last, as indices into the text."""
        words = list(_WORD.finditer(text))
        sentences, clauses = _boundaries(text, words)
        ends, first, last = [], 0, 0  # words [first, last) are the sentences of the current chunk
        for end in sentences:
            if last > first and end - first > self.max_words:
                ends.append(last)
                first = last
            while end - first > self.max_words:
                # Find the last clause that fits by bisection: there may be as many clauses as words.
                place = bisect.bisect_right(clauses, first + self.max_words) - 1
                fits = place >= 0 and clauses[place] >= first + self.min_words
                first = clauses[place] if fits else first + self.max_words
                ends.append(first)
            last = end
            if last - first >= self.min_words:
                ends.append(last)
                first = last
        # The last chunk ends with the text.
        return [words[end - 1].end() for end in ends if end < len(words)]


def _boundaries(text: str, words: list[re.Match[str]]) -> tuple[list[int], list[int]]:
    """Return the ends of sentences, and of clauses or lines, as numbers of words from the start."""
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
    """A text's tokens, and the places where chunks may end.

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
        """Return the first permitted chunk end, as a number of tokens, that includes the text up to ``end``."""
        last = bisect.bisect_left(self._reached, end)
        while last < len(self) and not self.cuttable[last]:
            last += 1
        return min(last + 1, len(self))

    def chunk(self, first: int, end: int) -> Chunk:
        """Return tokens [first, end) with their text; characters without a token go to the last chunk."""
        text_start = self._reached[first - 1] if first else 0
        text_end = len(self.text) if end == len(self) else self._reached[end - 1]
        return Chunk(self.text[text_start:text_end], tuple(self.ids[first:end]))


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[TokenizedText]:
    """Tokenize texts for the decoder.

    Raises
    ------
    TypeError
        If a text isn't a string.
    ValueError
        If a text contains half a surrogate pair, or the tokenizer doesn't provide offsets.
    """
    _require_offsets(tokenizer)
    for text in texts:
        require_text(text, "text")
    # A passage that contains "<|im_end|>" as text must not end its message.
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True, verbose=False
    )
    return [
        TokenizedText(text, ids, offsets, tokenizer)
        for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"])
    ]


def end_of_chunk(cuttable: Sequence[bool], first: int, count: int) -> int:
    """Return the end of a chunk that starts at token ``first``: ``count`` tokens on, or the nearest permitted end.

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
    """Return, for each token i, where the text of tokens 0..i ends and whether a chunk may end there.

    ``moved`` says whether a normalizer changed the text. It may have composed a letter with its marks, reordered the
    marks or dropped them; offsets may then point between a letter and its marks, or cover the marks with no token.
    """
    reached: list[int] = []
    end = 0
    starts = [start for start, _ in offsets[1:]] + [len(text)]
    for (_, token_end), next_start in zip(offsets, starts):
        end = max(end, token_end)
        while moved and end < next_start and _continues(text, end):
            end += 1
        reached.append(end)
    # A chunk may not end where the next token starts inside the same character.
    cuttable = [start >= end and not (moved and _continues(text, end)) for end, start in zip(reached, starts)]
    return reached, [*cuttable[:-1], True] if cuttable else []


def _continues(text: str, place: int) -> bool:
    """Return whether the character at ``place`` combines with the one before it: a mark, or part of a composition."""
    if not 0 < place < len(text) or (letter := text[place]) < "\u0300":
        return False
    if unicodedata.combining(letter) or "\u1160" <= letter <= "\u11ff":  # the vowels and finals of Korean syllables
        return True
    return len(unicodedata.normalize("NFC", text[place - 1 : place + 1])) == 1


def _require_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer: got {type(tokenizer).__name__}, needs a fast tokenizer, which provides offsets")
