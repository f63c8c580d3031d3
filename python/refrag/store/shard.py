"""A shard of a store: a safetensors file that is written once, atomically, and memory-mapped for reading."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from refrag.file_modes import usual_mode
from refrag.model.inputs import Chunk
from refrag.store.key_index import KEY_BYTES

# The tensors that all shards have.
_INDEX = (
    "keys", "offsets", "text", "text_offsets", "token_ids", "token_offsets", "id_keys", "id_passages", "ids",
    "id_offsets",
)  # fmt: skip


class StoreError(ValueError):
    """Raised if a chunk store can't be used for this purpose or at all; the message names the store or the passage."""


class Shard:
    """A memory-mapped shard.

    It contains these tensors for N passages with R chunks, and M passage ids:

    - ``keys`` uint8 [N, 16], ``offsets`` int64 [N + 1]: the passages' keys and their ranges of chunks
    - ``text`` uint8, ``text_offsets`` int64 [R + 1]: the chunks' text in UTF-8
    - ``token_ids`` int32, ``token_offsets`` int64 [R + 1]: the chunks' decoder tokens
    - ``id_keys`` and ``id_passages`` uint8 [M, 16]: digests of the ids, and the keys of their passages
    - ``ids`` uint8, ``id_offsets`` int64 [M + 1]: the ids in UTF-8

    The others are its ``payload``: what the store holds of the passages.

    Raises
    ------
    StoreError
        If the file is damaged or belongs to another store.
    """

    def __init__(self, path: Path, fingerprint_digest: bytes) -> None:
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                fingerprint = (file.metadata() or {}).get("recipe")
            if fingerprint != fingerprint_digest.hex():
                raise StoreError(f"{path}: is a shard of another store, with fingerprint {fingerprint}")
            arrays = {name: tensors.pop(name).numpy() for name in _INDEX}
            self.payload: dict[str, torch.Tensor] = tensors
            self.keys = arrays["keys"]
            self.offsets = arrays["offsets"]
            self.id_keys = arrays["id_keys"]
            self.id_passages = arrays["id_passages"]
            self._text, self._text_offsets = arrays["text"], arrays["text_offsets"]
            self._token_ids, self._token_offsets = arrays["token_ids"], arrays["token_offsets"]
            self._ids, self._id_offsets = arrays["ids"], arrays["id_offsets"]
        except (SafetensorError, KeyError, OSError) as error:
            raise StoreError(f"{path}: is damaged ({error})") from error

    def chunks(self, passage: int) -> list[Chunk]:
        """Return the chunks of a passage, given its number in the shard."""
        first, last = int(self.offsets[passage]), int(self.offsets[passage + 1])
        text_ends = self._text_offsets[first : last + 1].tolist()
        token_ends = self._token_offsets[first : last + 1].tolist()
        text = self._text[text_ends[0] : text_ends[-1]].tobytes()
        token_ids = self._token_ids[token_ends[0] : token_ends[-1]].tolist()
        return [
            Chunk(
                _decode(text[text_ends[i] - text_ends[0] : text_ends[i + 1] - text_ends[0]]),
                tuple(token_ids[token_ends[i] - token_ends[0] : token_ends[i + 1] - token_ends[0]]),
            )
            for i in range(last - first)
        ]

    def chunk_lengths(self, passage: int) -> tuple[int, ...]:
        """Return the number of tokens of each chunk of a passage."""
        first, last = int(self.offsets[passage]), int(self.offsets[passage + 1])
        return tuple(np.diff(self._token_offsets[first : last + 1]).tolist())

    def ids(self) -> list[str]:
        """Return the ids in the shard."""
        text, ends = self._ids.tobytes(), self._id_offsets.tolist()
        return [_decode(text[start:end]) for start, end in zip(ends, ends[1:])]


def write_shard(
    path: Path,
    fingerprint_digest: bytes,
    keys: Sequence[bytes],
    chunks: Sequence[Sequence[Chunk]],
    payload: Mapping[str, torch.Tensor],
    ids: Sequence[str],
    id_keys: Sequence[bytes],
    id_passages: Sequence[bytes],
) -> None:
    """Write a shard atomically and durably.

    Parameters
    ----------
    path : Path
    fingerprint_digest : bytes
    keys, chunks : N passages
    payload : mapping of str to Tensor
        What the store holds of the passages.
    ids, id_keys, id_passages : M ids

    Raises
    ------
    StoreError
        If it can't be written.
    """
    flat = [chunk for passage in chunks for chunk in passage]
    texts = [encode_text(chunk.text) for chunk in flat]
    names = [encode_text(name) for name in ids]
    token_ids = np.fromiter((token for chunk in flat for token in chunk.token_ids), np.int32)
    arrays = {
        "keys": _bytes(keys).reshape(-1, KEY_BYTES),
        "offsets": _offsets(map(len, chunks)),
        "text": _bytes(texts),
        "text_offsets": _offsets(map(len, texts)),
        "token_ids": token_ids,
        "token_offsets": _offsets(len(chunk.token_ids) for chunk in flat),
        "id_keys": _bytes(id_keys).reshape(-1, KEY_BYTES),
        "id_passages": _bytes(id_passages).reshape(-1, KEY_BYTES),
        "ids": _bytes(names),
        "id_offsets": _offsets(map(len, names)),
    }
    tensors = {name: tensor.contiguous() for name, tensor in payload.items()}
    tensors |= {name: torch.from_numpy(array) for name, array in arrays.items()}
    part = path.with_name(f".part-{path.name}")
    try:
        save_file(tensors, part, metadata={"recipe": fingerprint_digest.hex()})
        publish(part, path)
    except (SafetensorError, OSError) as error:  # for example a full disk
        part.unlink(missing_ok=True)
        raise StoreError(f"{path}: can't be written ({error})") from error


def publish(part: Path, path: Path) -> None:
    """Rename a finished file to its final name, so that even after a power failure it is complete or absent."""
    os.chmod(part, usual_mode(part.parent))
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def encode_text(text: str) -> bytes:
    """Encode any Python string as UTF-8, including unpaired surrogates."""
    return text.encode("utf-8", "surrogatepass")


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "surrogatepass")


def _bytes(parts: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(bytearray(b"".join(parts)), np.uint8)


def _offsets(lengths) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(list(lengths), dtype=np.int64)]).astype(np.int64)
