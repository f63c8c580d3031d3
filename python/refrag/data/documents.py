"""Documents for training and evaluation: loaded with ``datasets``, tokenized and deduplicated by content."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from refrag.data.chunking import tokenize

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_TEXT = (".txt", ".text", ".md", ".rst")


@dataclasses.dataclass(frozen=True)
class Documents:
    """Tokenized documents, concatenated.

    Attributes
    ----------
    token_ids : ndarray, int64 [N]
    offsets : ndarray, int64 [D+1]
        Start of each document.
    cuttable : ndarray, bool [N], optional
        Whether a chunk may end with each token, see ``FixedChunks``. Without it, a chunk may end anywhere.
    """

    token_ids: np.ndarray
    offsets: np.ndarray
    cuttable: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def windows(self, length: int) -> Windows:
        """Return all runs of ``length`` tokens within a document.

        Raises
        ------
        ValueError
            If no document is that long.
        """
        counts = np.maximum(np.diff(self.offsets) - length + 1, 0)
        if not counts.any():
            longest = int(np.diff(self.offsets).max(initial=0))
            raise ValueError(f"documents: the longest has {longest} tokens, needs {length} for one sample")
        return Windows(self, length, np.concatenate([[0], np.cumsum(counts)]))


class Excerpt(NamedTuple):
    """A run of tokens that begins at a character boundary, and whether a chunk may end with each token."""

    token_ids: list[int]
    cuttable: list[bool]


@dataclasses.dataclass(frozen=True)
class Windows:
    """All runs of a given length within documents, from ``Documents.windows``.

    A run that would start within a character starts at its first token.
    """

    documents: Documents
    length: int
    first_of_document: np.ndarray

    def __len__(self) -> int:
        return int(self.first_of_document[-1])

    def __getitem__(self, index: int) -> Excerpt:
        if not 0 <= index < len(self):
            raise IndexError(f"index: got {index}, needs 0 to {len(self) - 1}")
        document = int(np.searchsorted(self.first_of_document, index, side="right")) - 1
        first = int(self.documents.offsets[document])
        start = first + index - int(self.first_of_document[document])
        cuttable = self.documents.cuttable
        if cuttable is None:
            return Excerpt(self.documents.token_ids[start : start + self.length].tolist(), [True] * self.length)
        while start > first and not cuttable[start - 1]:  # move back to the start of the character
            start -= 1
        window = slice(start, start + self.length)
        return Excerpt(self.documents.token_ids[window].tolist(), cuttable[window].tolist())

    def draw(self, seed: int, index: int) -> Excerpt:
        """Return a uniformly random run, determined by ``seed`` and ``index`` so that training can be resumed."""
        return self[int(np.random.default_rng([seed, index]).integers(len(self)))]


def read_documents(
    sources: Sequence[str | Path], tokenizer: PreTrainedTokenizerBase, *, column: str = "text"
) -> Documents:
    """Read and tokenize documents.

    ``datasets`` loads the documents and caches the result, so that they are tokenized only once.

    Parameters
    ----------
    sources : sequence of str or Path
        Folders (every .txt, .text, .md and .rst file in them is a document), such files, .jsonl or .parquet files with
        a row per document, or datasets of the Hugging Face Hub, as "name" or "name:split".
    tokenizer : PreTrainedTokenizerBase
        The decoder's tokenizer, which must be a fast one, because offsets are needed.
    column : str
        Name of the text column in .jsonl files, .parquet files and datasets.

    Returns
    -------
    Documents
        Without duplicates.

    Raises
    ------
    ValueError
        If there is no document, a source lacks the column, a file isn't UTF-8 (the message names it), or the tokenizer
        doesn't provide offsets.
    """
    import datasets

    parts = []
    for source in map(str, sources):
        try:
            parts.append(_load(datasets, source, column))
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(f"sources: {_broken(source)} can't be read: {error.__cause__ or error}") from None
    if not sum(map(len, parts)):
        raise ValueError(f"sources: got {', '.join(map(str, sources)) or 'none'}, which contain no documents")
    joined = datasets.concatenate_datasets(parts)
    seen: set[bytes] = set()
    fresh = [index for index, text in enumerate(joined["text"]) if text.strip() and _is_new(text, seen)]

    def tokens(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        texts = tokenize(tokenizer, batch["text"])
        return {"ids": [text.ids for text in texts], "cuttable": [text.cuttable for text in texts]}

    tokenized = joined.select(fresh).map(
        tokens, batched=True, batch_size=64, remove_columns=["text"], desc="tokenizing"
    )  # fmt: skip
    return _joined(
        [np.asarray(ids, dtype=np.int64) for ids in tokenized["ids"]],
        [np.asarray(own, dtype=bool) for own in tokenized["cuttable"]],
    )


def split_documents(documents: Documents, held_out: float) -> tuple[Documents, Documents]:
    """Split documents into a training set and a test set; the test set has a fraction ``held_out`` of them.

    The assignment of a document depends only on its own tokens, so it doesn't change if other documents are added or
    removed.

    Examples
    --------
    >>> documents = Documents(np.arange(1000), np.arange(0, 1001, 10))
    >>> [len(part) for part in split_documents(documents, 0.2)]
    [80, 20]
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out: got {held_out}, needs a fraction from 0 up to 1")
    sides: tuple[list[int], list[int]] = ([], [])
    spans = list(zip(documents.offsets[:-1], documents.offsets[1:]))
    for number, (start, end) in enumerate(spans):
        digest = int.from_bytes(hashlib.sha256(documents.token_ids[start:end].tobytes()).digest()[:8], "big")
        sides[digest / 2**64 < held_out].append(number)

    def part(array: np.ndarray, numbers: list[int]) -> list[np.ndarray]:
        return [array[slice(*spans[number])] for number in numbers]

    train, test = (
        _joined(
            part(documents.token_ids, numbers),
            None if documents.cuttable is None else part(documents.cuttable, numbers),
        )
        for numbers in sides
    )
    return train, test


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens to begin every sequence with: the tokenizer's own prefix, or else its BOS or EOS token.

    Decoders use their first row as an attention sink and take almost no information from it (arXiv 2309.17453), so a
    slot there would be lost.
    """
    own = tokenizer("", add_special_tokens=True)["input_ids"]
    if own:
        return list(own)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [] if first is None else [first]


def _load(datasets: Any, source: str, column: str) -> Any:
    path = Path(source)
    if path.is_dir():
        files = sorted(str(file) for file in path.rglob("*") if file.suffix in _TEXT and file.is_file())
        if not files:
            raise ValueError(f"sources: got {source}, needs a folder with a {', '.join(_TEXT)} file")
        loaded = datasets.load_dataset("text", data_files=files, sample_by="document", split="train")
    elif path.suffix in _TEXT and path.exists():
        loaded = datasets.load_dataset("text", data_files=[source], sample_by="document", split="train")
    elif path.suffix in _BUILDERS and path.exists():
        loaded = datasets.load_dataset(_BUILDERS[path.suffix], data_files=[source], split="train")
    elif path.suffix in _TEXT or path.suffix in _BUILDERS or path.is_absolute():
        raise ValueError(f"sources: got {source}, which does not exist")
    else:
        name, _, split = source.partition(":")
        loaded = datasets.load_dataset(name, split=split or "train")
    if column not in loaded.column_names:
        column = "text" if "text" in loaded.column_names else column
    if column not in loaded.column_names:
        raise ValueError(f"column: got {column!r}, needs one that {source} has: {', '.join(loaded.column_names)}")
    loaded = loaded.select_columns([column])
    return loaded if column == "text" else loaded.rename_column(column, "text")


def _broken(source: str) -> str:
    """Return the file of a source that isn't valid UTF-8; the source itself if all files are."""
    path = Path(source)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.suffix in _TEXT and file.is_file():
            try:
                file.read_text(encoding="utf-8")
            except ValueError:
                return str(file)
    return source


def _is_new(text: str, seen: set[bytes]) -> bool:
    digest = hashlib.sha256(text.encode()).digest()
    new = digest not in seen
    seen.add(digest)
    return new


def _joined(parts: list[np.ndarray], cuttable: list[np.ndarray] | None) -> Documents:
    lengths = [len(part) for part in parts]
    return Documents(
        np.concatenate([np.zeros(0, np.int64), *parts]),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        None if cuttable is None else np.concatenate([np.zeros(0, bool), *cuttable]),
    )
