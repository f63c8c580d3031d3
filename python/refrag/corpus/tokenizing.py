"""Tokenizes a corpus into token files, for training on a machine without a network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from refrag.corpus.budget import even_level
from refrag.training.token_files import TokenSet, tokenizer_hash, tokens_inside_characters, write_tokens

_BATCH = 256  # documents per batch: enough to keep the tokenizer's threads busy


def tokenize_corpus(
    corpus: Path,
    output: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int | None = None,
    other_tokens: int = 500_000,
    held_out_tokens: int = 300_000,
    piece_bytes: int | None = None,
    progress: Callable[[Sequence[Path]], Iterable[Path]] = iter,
) -> list[Path]:
    """Write the token files of a corpus made by ``build_corpus``.

    Parameters
    ----------
    corpus, output : Path
        Folders. Existing token files are replaced.
    tokenizer : PreTrainedTokenizerBase
        The decoder's.
    tokens : int, optional
        Number of training tokens; all by default. Every source is cut to the same maximum, which is chosen to reach
        this number.
    other_tokens, held_out_tokens : int
        Maximum tokens of the validation set, and of each held-out domain.
    piece_bytes : int, optional
        Maximum size of a file; larger sets are written in pieces.
    progress : callable, optional
        Wraps the files of the corpus to show progress.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    ValueError
        If the folder contains no corpus, the tokenizer's numbers don't fit into 16 bits, or there are fewer training
        tokens than requested.
    """
    if len(tokenizer) > 1 << 16:
        raise ValueError(f"tokenizer: has {len(tokenizer)} tokens, needs {1 << 16} or fewer, for 16-bit numbers")
    # Tokenize the training text first, so that nothing has been written if there is too little of it.
    files = sorted(corpus.glob("*.jsonl"), key=lambda file: (file.name != "train.jsonl", file.name))
    if not files or files[0].name != "train.jsonl":
        raise ValueError(f"{corpus}: has no train.jsonl, needs the output of `refrag data corpus`")
    written, inside = [], tokens_inside_characters(tokenizer)
    for file in progress(files):
        documents, sources = _tokenize(file, tokenizer)
        sizes: dict[str, int] = {}
        for document, source in zip(documents, sources):
            sizes[source] = sizes.get(source, 0) + len(document)
        total = sum(sizes.values())
        if file.stem == "train":
            limit = total if tokens is None else tokens
        else:
            limit = min(total, held_out_tokens if file.stem.startswith("heldout") else other_tokens)
        if not documents:
            continue
        level = even_level(list(sizes.values()), limit)
        kept = _up_to(level, documents, sources, inside)
        content = TokenSet(
            np.concatenate([documents[index][:count] for index, count in kept]),
            np.array([count for _, count in kept], dtype=np.uint32),
            [sources[index] for index, _ in kept],
            file.stem,
            tokenizer_hash(tokenizer),
        )
        written += write_tokens(output / f"{file.stem}.tok", content, piece_bytes=piece_bytes)
    return written


def _tokenize(file: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[list[np.ndarray], list[str]]:
    fast: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    before, fast.encode_special_tokens = fast.encode_special_tokens, True  # "<|im_end|>" in a text is text
    documents: list[np.ndarray] = []
    sources: list[str] = []
    try:
        with open(file, encoding="utf-8") as lines:
            batch: list[str] = []
            for line in lines:
                record = json.loads(line)
                sources.append(record["source"])
                batch.append(record["text"])
                if len(batch) == _BATCH:
                    documents += _encode(fast, batch)
                    batch = []
            documents += _encode(fast, batch)
    finally:
        fast.encode_special_tokens = before
    return documents, sources


def _encode(fast: Any, texts: list[str]) -> list[np.ndarray]:
    encoded = fast.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.uint16) for encoding in encoded]


def _up_to(level: int, documents: list[np.ndarray], sources: list[str], inside: np.ndarray) -> list[tuple[int, int]]:
    """Return the documents to keep, and how many tokens of each, so that no source has more than ``level``.

    Cuts documents only between characters.
    """
    left = dict.fromkeys(sources, level)
    kept = []
    for index, (document, source) in enumerate(zip(documents, sources)):
        count = min(len(document), left[source])
        while 0 < count < len(document) and inside[document[count]]:
            count -= 1
        if count:
            kept.append((index, count))
            left[source] -= count
    return kept
