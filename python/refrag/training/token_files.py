"""Files of tokenized documents, readable with numpy and the standard library alone.

A file consists of a header, one line of JSON, and an xz stream of three little-endian arrays: the tokens as uint16, the
number of tokens of each document as uint32, and the source of each document as a uint16 index into the header's list. A
large set is split into several files, called pieces, between documents.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import lzma
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refrag.file_modes import write_whole

_FORMAT = "refrag tokens 1"
_LIMIT = 1 << 20  # maximum bytes of a header; most of it is the list of sources
# Tokens are pairs of bytes: literals and positions depend on the lowest bit of the position (lp, pb = 1).
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 26, "lc": 3, "lp": 1, "pb": 1}]
# Byte-level tokenizers map the bytes 0x80 to 0xBF, which continue a character in UTF-8, to themselves if they are
# printable in Latin-1, and otherwise to code points from U+0122 on, after the 34 unprintable bytes of ASCII.
_CONTINUING = frozenset({chr(byte) for byte in range(0xA1, 0xC0) if byte != 0xAD} | set(map(chr, range(0x122, 0x144))))


class TokenFileError(ValueError):
    """Raised if a file is not a token file, is damaged, or must not be used in this way; the message names it."""


@dataclasses.dataclass(frozen=True)
class TokenSet:
    """Tokenized documents and their split.

    Attributes
    ----------
    tokens : ndarray, uint16 [N]
    lengths : ndarray, uint32 [documents]
        Tokens of each document.
    sources : sequence of str
        Source of each document.
    split : str
        "train", "valid" or "heldout-NAME".
    tokenizer : str
        The tokenizer's hash, from ``tokenizer_hash``.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    sources: Sequence[str]
    split: str
    tokenizer: str


def load_tokens(
    paths: Sequence[str | os.PathLike[str]], *, training: bool = False, tokenizer: str | None = None
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Read one or more token files.

    Parameters
    ----------
    paths : sequence of path
        The files: all pieces of each set. All sets must be made with one tokenizer.
    training : bool
        Refuse files that are marked as held out.
    tokenizer : str, optional
        Required hash of the files' tokenizer, from ``tokenizer_hash``.

    Returns
    -------
    tokens : ndarray, uint16 [N]
    offsets : ndarray, int64 [documents + 1]
        Where each document starts.
    sources : list of str
        Source of each document.

    Raises
    ------
    TokenFileError
        If no file is given, a file is not a token file or is damaged, a piece is missing or given twice, tokenizers
        differ, or ``training`` is set and a file is held out. The message names the file.
    """
    if not paths:
        raise TokenFileError("paths: got none, needs token files")
    tokens, lengths, sources = [], [], []
    pieces: dict[str, dict[int, Path]] = {}
    counts: dict[str, int] = {}
    for path in map(Path, paths):
        header = read_header(path)
        if training and header["held_out"]:
            raise TokenFileError(f"{path}: is held out ({header['split']}) and must not be trained on")
        tokenizer = tokenizer or header["tokenizer"]
        if header["tokenizer"] != tokenizer:
            raise TokenFileError(f"{path}: has tokens of tokenizer {header['tokenizer'][:12]}, needs {tokenizer[:12]}")
        number, count = header["piece"]
        counts[header["set"]] = count
        if pieces.setdefault(header["set"], {}).setdefault(number, path) is not path:
            raise TokenFileError(f"{path}: is given twice (also as {pieces[header['set']][number]})")
        own_tokens, own_lengths, own_sources = _read_arrays(path, header)
        tokens.append(own_tokens)
        lengths.append(own_lengths)
        sources += [header["sources"][index] for index in own_sources.tolist()]
    for name, found in pieces.items():
        missing = sorted(set(range(1, counts[name] + 1)) - set(found))
        if missing:
            raise TokenFileError(f"{next(iter(found.values()))}: is one of {counts[name]} pieces; {missing} missing")
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths), dtype=np.int64)])
    return np.concatenate(tokens), offsets, sources


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a file's header.

    Returns
    -------
    dict
        The fields tokens, documents, tokens_of_source, split, held_out, tokenizer (its hash), piece ([number, number of
        pieces]), sources, set and sha256 (of the arrays).

    Raises
    ------
    TokenFileError
        If the file is not a token file.
    """
    with open(path, "rb") as file:
        line = file.readline(_LIMIT)
    try:
        header = json.loads(line)
        if header["format"] != _FORMAT:
            raise TokenFileError(f"{path}: has format {header['format']!r}, needs {_FORMAT!r}")
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, TokenFileError):
            raise
        raise TokenFileError(f"{path}: is not a token file") from None
    return header


def write_tokens(path: Path, content: TokenSet, *, piece_bytes: int | None = None) -> list[Path]:
    """Write token files atomically.

    Parameters
    ----------
    path : Path
        NAME.tok; several pieces are called NAME-1.tok, NAME-2.tok and so on.
    content : TokenSet
    piece_bytes : int, optional
        Maximum size of a piece; documents are distributed by their uncompressed size.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    ValueError
        If a document has no tokens, or doesn't fit into a piece.
    """
    lengths = content.lengths.astype("<u4")
    if (
        not len(lengths)
        or not lengths.all()
        or lengths.sum() != len(content.tokens)
        or len(content.sources) != len(lengths)
    ):
        raise ValueError("content: needs documents of one token or more, and a source for each")
    bounds = _piece_bounds(lengths, piece_bytes)
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    whole = hashlib.sha256(content.tokens.astype("<u2").tobytes() + lengths.tobytes()).hexdigest()
    files = []
    for number, (first, last) in enumerate(zip(bounds, bounds[1:]), 1):
        own = content.sources[first:last]
        names = sorted(set(own))
        tokens = content.tokens[ends[first] : ends[last]].astype("<u2")
        index = np.array([names.index(source) for source in own], dtype="<u2")
        arrays = tokens.tobytes() + lengths[first:last].tobytes() + index.tobytes()
        header = {
            "format": _FORMAT,
            "split": content.split,
            "held_out": content.split.startswith("heldout"),
            "piece": [number, len(bounds) - 1],
            "set": whole[:16],
            "tokenizer": content.tokenizer,
            "tokens": len(tokens),
            "documents": int(last - first),
            "sources": names,
            "tokens_of_source": dict(zip(names, np.bincount(index, lengths[first:last]).astype(int).tolist())),
            "sha256": hashlib.sha256(arrays).hexdigest(),
        }
        name = path if len(bounds) == 2 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        stream = lzma.compress(arrays, format=lzma.FORMAT_XZ, filters=_FILTERS)
        write_whole(name, json.dumps(header).encode() + b"\n" + stream)
        files.append(name)
    return files


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a hash of a fast tokenizer's vocabulary, which determines its token numbers."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def tokens_inside_characters(tokenizer: Any) -> np.ndarray:
    """Return which tokens begin inside a character, so that ``FixedChunks`` begins no chunk with them.

    For byte-level tokenizers and those with byte fallback, these are the tokens whose first byte continues a character
    in UTF-8; other tokenizers have none. A combining mark that a normalizer such as NFC left separate from its letter
    counts as a character, as it does for ``FixedChunks`` in normalized text.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast

    Returns
    -------
    ndarray, bool [65536]
        Indexed by token number.

    Raises
    ------
    ValueError
        If the tokenizer is not a fast one.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer: got {type(tokenizer).__name__}, needs a fast tokenizer")
    form = json.loads(tokenizer.backend_tokenizer.to_str())
    whole = {token["content"] for token in form["added_tokens"]}
    byte_level = any('"ByteLevel"' in json.dumps(form[part]) for part in ("pre_tokenizer", "decoder"))
    fallback = {f"<0x{byte:02X}>" for byte in range(0x80, 0xC0)} if form["model"].get("byte_fallback") else set()
    inside = np.zeros(1 << 16, bool)
    for token, number in tokenizer.get_vocab().items():
        if number < len(inside) and token not in whole:
            inside[number] = token in fallback or (byte_level and token[:1] in _CONTINUING)
    return inside


def _read_arrays(path: Path, header: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with open(path, "rb") as file:
        file.readline(_LIMIT)
        try:
            arrays = lzma.decompress(file.read())
        except (lzma.LZMAError, EOFError) as error:
            raise TokenFileError(f"{path}: is damaged ({error})") from None
    count, documents = header["tokens"], header["documents"]
    if len(arrays) != 2 * count + 6 * documents or hashlib.sha256(arrays).hexdigest() != header["sha256"]:
        raise TokenFileError(f"{path}: is damaged (the hash in its header doesn't match its content)")
    tokens = np.frombuffer(arrays, "<u2", count)
    lengths = np.frombuffer(arrays, "<u4", documents, 2 * count)
    return tokens, lengths, np.frombuffer(arrays, "<u2", documents, 2 * count + 4 * documents)


def _piece_bounds(lengths: np.ndarray, piece_bytes: int | None) -> list[int]:
    """Split documents into pieces of similar size; return the index of each piece's first document, and the end."""
    if piece_bytes is None:
        return [0, len(lengths)]
    # xz adds less than 0.1% to incompressible data, so the limit holds for any content.
    limit = piece_bytes - piece_bytes // 1000 - (64 << 10)
    bytes_of = 2 * lengths.astype(np.int64) + 6
    if bytes_of.max() > limit:
        raise ValueError(f"piece_bytes: got {piece_bytes}, needs more for a document of {lengths.max()} tokens")
    pieces = -(-int(bytes_of.sum()) // limit)
    while True:
        target = -(-int(bytes_of.sum()) // pieces)
        piece_of = np.minimum((np.cumsum(bytes_of) - 1) // target, pieces - 1)
        if np.bincount(piece_of, bytes_of, pieces).max() <= limit:
            return [*np.searchsorted(piece_of, np.arange(pieces)).tolist(), len(lengths)]
        pieces += 1
