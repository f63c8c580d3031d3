"""Cutting a passage into chunks."""

from __future__ import annotations

from typing import Protocol

from transformers import PreTrainedTokenizerBase

from refrag.prompt import Chunk


class Chunker(Protocol):
    """Cuts a text into chunks; every character of the text is in exactly one of them, in order."""

    def __call__(self, text: str) -> list[Chunk]: ...


class FixedChunks:
    """Chunks of k decoder tokens (REFRAG, section 2); a passage's last chunk may be shorter.

    A character that the tokenizer splits into several tokens (an emoji under a byte-level tokenizer) is never split
    between two chunks: the chunk ends before it, or, where it alone has more than k tokens, after it. So a chunk's
    tokens and its text always stand for the same characters, and the encoder never sees half a character.

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
        if not tokenizer.is_fast:
            raise ValueError(f"tokenizer: got {type(tokenizer).__name__}, needs a fast tokenizer, which gives offsets")
        self.tokenizer = tokenizer
        self.k = k

    def __call__(self, text: str) -> list[Chunk]:
        # A passage that spells out "<|im_end|>" must not end the message it stands in.
        encoding = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True, verbose=False
        )
        token_ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        if not token_ids:
            return []
        # reached[i]: where the text of tokens 0..i ends. Between i and i + 1 the text may be cut unless token i + 1
        # starts inside a character that has already begun.
        reached, end = [], 0
        for _, token_end in offsets:
            end = max(end, token_end)
            reached.append(end)
        cuttable = [later[0] >= end for end, later in zip(reached, offsets[1:])] + [True]
        chunks, first, text_start = [], 0, 0
        while first < len(token_ids):
            last = min(first + self.k, len(token_ids)) - 1
            within = last
            while within >= first and not cuttable[within]:
                within -= 1
            if within < first:
                within = last
                while not cuttable[within]:
                    within += 1
            text_end = len(text) if within + 1 == len(token_ids) else reached[within]
            chunks.append(Chunk(text[text_start:text_end], tuple(token_ids[first : within + 1])))
            first, text_start = within + 1, text_end
        return chunks
