"""ChunkStore: chunk embeddings on disk, keyed by the content that they were computed from."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from refrag import deprecated
from refrag.model.inputs import Chunk, Passage
from refrag.store.fingerprint import Fingerprint
from refrag.store.key_index import KEY_BYTES
from refrag.store.shard import Shard, StoreError, encode_text, publish, write_shard
from refrag.store.store_state import StoreState, key_of_id

_FORMAT = 1
_MANIFEST = "store.json"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


class UnknownPassageError(StoreError):
    """Raised if a passage isn't in the store."""


class PassageEmbeds(NamedTuple):
    """Chunk embeddings of some passages, concatenated.

    Attributes
    ----------
    rows : Tensor [N, d_enc]
        In the store's dtype.
    offsets : list of int
        Passage i has rows offsets[i] to offsets[i + 1].
    """

    rows: torch.Tensor
    offsets: list[int]


class PutCounts(NamedTuple):
    """Counts of a ``put``: new passages, known passages, and ids that referred to another text before."""

    new: int
    known: int
    moved_ids: int


class ChunkStore:
    """Chunk embeddings of passages in immutable, memory-mapped safetensors shards.

    A passage's key is blake2b over its text, keyed by the digest of the ``Fingerprint``: the encoder's weights, the
    tokenizers, the chunker with its k, and the pooling. A passage is therefore encoded only once, and embeddings from
    another encoder are never returned. The rows are the projector's inputs, so training the projector doesn't
    invalidate them. The store also contains the chunks' text and tokens: a prompt with ``Passage(id=...)`` needs no
    tokenizing or encoding.

    One process writes at a time while others wait for the lock; any number of processes read concurrently. A shard is
    written to a temporary file, synced and renamed, so a killed writer leaves all earlier shards intact and no partial
    shard. Readers see later shards after ``refresh``.

    Use ``create`` or ``open`` to get a store, and ``PassageEncoder.fill`` or ``refrag encode`` to fill it.

    Examples
    --------
    >>> import tempfile
    >>> fingerprint = Fingerprint("tiny", "1", "2", "3", "fixed, k = 2", "first", True, width=4)
    >>> folder = tempfile.TemporaryDirectory()
    >>> store = ChunkStore.create(folder.name, fingerprint)
    >>> chunks = [Chunk("It ra", (5, 6)), Chunk("ined.", (7, 8))]
    >>> store.put([Passage("It rained.", "weather")], [chunks], torch.ones(2, 4))
    PutCounts(new=1, known=0, moved_ids=0)
    >>> store.get(Passage(id="weather")).shape
    torch.Size([2, 4])
    >>> ChunkStore.open(folder.name, fingerprint).passage("weather").text
    'It rained.'
    """

    def __init__(self, folder: Path, fingerprint: Fingerprint, dtype: torch.dtype) -> None:
        self.folder = folder.absolute()  # the same from any working directory
        self.fingerprint = fingerprint
        self.dtype = dtype
        self._state = StoreState()
        self._refreshing = threading.Lock()
        self.refresh()

    recipe = deprecated.renamed_attribute("recipe", "fingerprint")

    @classmethod
    @deprecated.renamed_keyword("recipe", "fingerprint")
    def create(
        cls, folder: str | os.PathLike[str], fingerprint: Fingerprint, dtype: torch.dtype = torch.float32
    ) -> ChunkStore:
        """Create an empty store.

        Parameters
        ----------
        folder : path
            Created if it doesn't exist.
        fingerprint : Fingerprint
        dtype : {torch.float32, torch.bfloat16, torch.float16}
            Dtype of the rows on disk.

        Raises
        ------
        StoreError
            If the folder already contains a store, or the dtype isn't supported.
        """
        root = Path(folder)
        if dtype not in DTYPES.values():
            raise StoreError(f"dtype: got {dtype}, needs one of {', '.join(DTYPES)}")
        root.mkdir(parents=True, exist_ok=True)
        with _writing(root):
            if (root / _MANIFEST).exists():
                raise StoreError(f"store {root}: exists already, open it with ChunkStore.open")
            manifest = {
                "format": _FORMAT,
                "dtype": str(dtype).removeprefix("torch."),
                "recipe": dataclasses.asdict(fingerprint),
            }
            part = root / f".part-{_MANIFEST}"
            part.write_text(json.dumps(manifest, indent=2) + "\n")
            publish(part, root / _MANIFEST)
        return cls(root, fingerprint, dtype)

    @classmethod
    @deprecated.renamed_keyword("recipe", "fingerprint")
    def open(cls, folder: str | os.PathLike[str], fingerprint: Fingerprint | None = None) -> ChunkStore:
        """Open a store.

        Parameters
        ----------
        folder : path
        fingerprint : Fingerprint, optional
            The fingerprint that the store must have. Without it, nothing is compared: for a program that has no
            encoder, only a projector trained for the store's encoder.

        Raises
        ------
        StoreError
            If there is no store, its fingerprint differs (states the differences), or a shard is damaged.
        """
        root = Path(folder)
        try:
            manifest = json.loads((root / _MANIFEST).read_text())
            if manifest["format"] != _FORMAT:
                raise StoreError(f"store {root}: has format {manifest['format']}, needs {_FORMAT}")
            held, dtype = Fingerprint(**manifest["recipe"]), DTYPES[manifest["dtype"]]
        except FileNotFoundError:
            raise _not_a_store(root) from None
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise StoreError(f"store {root}: its {_MANIFEST} can't be read ({error})") from error
        _require(root, held, fingerprint or held)
        return cls(root, held, dtype)

    @deprecated.renamed_keyword("recipe", "fingerprint")
    def require(self, fingerprint: Fingerprint) -> None:
        """Refuse a fingerprint other than the store's.

        Raises
        ------
        StoreError
            If they differ; states the differences.
        """
        _require(self.folder, self.fingerprint, fingerprint)

    def __len__(self) -> int:
        """Return the number of passages with distinct texts."""
        return len(self._state.passages)

    def __contains__(self, passage: Passage) -> bool:
        return self.holds([passage])[0]

    def __repr__(self) -> str:
        return f"ChunkStore({str(self.folder)!r}, {len(self):,} passages of {self.fingerprint.encoder})"

    def __reduce__(self):
        return ChunkStore.open, (self.folder, self.fingerprint)

    def refresh(self) -> int:
        """Load shards written in the meantime, and return the number of passages that they add.

        Raises
        ------
        StoreError
            If the store no longer exists or a shard is damaged.
        """
        with self._refreshing:
            if not (self.folder / _MANIFEST).exists():
                raise _not_a_store(self.folder)
            state = self._state
            known = set(state.names)
            names = sorted(path.name for path in self.folder.glob("shard-*.safetensors") if path.name not in known)
            if not names:
                return 0
            shards = [Shard(self.folder / name, self.fingerprint.digest) for name in names]
            self._state = state.extended(names, shards)
            return len(self._state.passages) - len(state.passages)

    def ids(self) -> Iterator[str]:
        """Yield each passage id once."""
        seen = set()
        for shard in self._state.shards:
            for name in shard.ids():
                if name not in seen:
                    seen.add(name)
                    yield name

    def get(self, passage: Passage) -> torch.Tensor:
        """Return a passage's chunk embeddings; see ``get_many``.

        Returns
        -------
        Tensor [n, d_enc]
        """
        return self.get_many([passage]).rows

    def get_many(self, passages: Sequence[Passage]) -> PassageEmbeds:
        """Return the chunk embeddings of passages.

        Parameters
        ----------
        passages : sequence of Passage
            Each is found by its text, or by its id if it has no text.

        Returns
        -------
        PassageEmbeds
            A copy of the rows, in the order of ``passages``.

        Raises
        ------
        UnknownPassageError
            If a passage isn't in the store; names it.
        """
        parts, offsets = [], [0]
        for shard, place in self._locate(passages):
            first, last = shard.offsets[place : place + 2].tolist()
            parts.append(shard.rows[first:last])
            offsets.append(offsets[-1] + last - first)
        rows = torch.cat(parts) if parts else torch.empty(0, self.fingerprint.width, dtype=self.dtype, device="cpu")
        return PassageEmbeds(rows, offsets)

    def chunks(self, passages: Sequence[Passage]) -> list[list[Chunk]]:
        """Return the stored chunks of passages, which are found as in ``get_many``."""
        return [shard.chunks(place) for shard, place in self._locate(passages)]

    def passage(self, id: str) -> Passage:
        """Return the passage with an id, including its text.

        Raises
        ------
        UnknownPassageError
            If the id isn't in the store.
        """
        return Passage("".join(chunk.text for chunk in self.chunks([Passage(id=id)])[0]), id)

    def holds(self, passages: Sequence[Passage]) -> list[bool]:
        """Return for each passage whether it is in the store, where it is found as in ``get_many``."""
        return (self._places(self._state, passages) >= 0).tolist()

    def missing(self, passages: Sequence[Passage]) -> list[int]:
        """Return the indices of passages whose text is new, or whose id doesn't refer to that text yet."""
        state = self._state
        keys = [self._key(passage.text) for passage in passages]
        absent = state.find(keys) < 0
        named = {index: passage.id for index, passage in enumerate(passages) if passage.id is not None}
        for index, key in zip(named, state.keys_of_ids(list(named.values()))):
            absent[index] |= key != keys[index]
        return np.flatnonzero(absent).tolist()

    def put(
        self,
        passages: Sequence[Passage],
        chunks: Sequence[Sequence[Chunk]],
        embeds: torch.Tensor,
        *,
        aliases: Sequence[Passage] = (),
    ) -> PutCounts:
        """Add passages as one shard, except those whose text is in the store already.

        An id that referred to another text refers to the new one afterwards.

        Parameters
        ----------
        passages : sequence of Passage
        chunks : sequence of sequences of Chunk
            The chunks of each passage, which together make up its text.
        embeds : Tensor [N, d_enc]
            The embeddings of all chunks, in order.
        aliases : sequence of Passage
            Additional ids for texts that are in the store or added by this call.

        Returns
        -------
        PutCounts

        Raises
        ------
        StoreError
            If the arguments are inconsistent, a passage has no text, or a row isn't finite in the store's dtype.
            Nothing is written then.
        """
        rows = self._checked(passages, chunks, embeds)
        ends = np.cumsum([0, *map(len, chunks)]).tolist()
        keys = [self._key(passage.text) for passage in passages]
        with _writing(self.folder):
            self.refresh()
            state = self._state
            known = state.find(keys) >= 0
            first_of_key: dict[bytes, int] = {}
            for index, key in enumerate(keys):
                first_of_key.setdefault(key, index)
            new = [index for index in first_of_key.values() if not known[index]]
            named = [*passages, *aliases]
            wanted = {
                passage.id: key
                for passage, key in zip(named, [*keys, *self._keys_of_aliases(state, first_of_key, aliases)])
                if passage.id is not None
            }
            held = state.keys_of_ids(list(wanted))
            ids = {name: key for (name, key), old in zip(wanted.items(), held) if old != key}
            counts = PutCounts(
                new=len(new),
                known=len(keys) - len(new),
                moved_ids=sum(old not in (None, key) for key, old in zip(wanted.values(), held)),
            )
            if new or ids:
                # This overwrites a temporary file of the same number that a killed writer left behind.
                number = 1 + max((int(name[6:-12]) for name in state.names), default=-1)
                write_shard(
                    self.folder / f"shard-{number:08d}.safetensors",
                    self.fingerprint.digest,
                    [keys[index] for index in new],
                    [chunks[index] for index in new],
                    torch.cat([rows[:0], *(rows[ends[index] : ends[index + 1]] for index in new)]),
                    list(ids),
                    [key_of_id(name) for name in ids],
                    list(ids.values()),
                )
        self.refresh()
        return counts

    def _checked(
        self, passages: Sequence[Passage], chunks: Sequence[Sequence[Chunk]], embeds: torch.Tensor
    ) -> torch.Tensor:
        """Check the arguments of ``put`` and return the rows in the store's dtype."""
        if len(chunks) != len(passages):
            raise StoreError(f"chunks: got {len(chunks)} lists, needs {len(passages)}, one for each passage")
        for index, (passage, own) in enumerate(zip(passages, chunks)):
            if not passage.text.strip():
                raise StoreError(f"passage {_name(passage, index)}: has no text")
            if "".join(chunk.text for chunk in own) != passage.text:
                raise StoreError(f"passage {_name(passage, index)}: its chunks together are not its text")
        needed = [sum(map(len, chunks)), self.fingerprint.width]
        if list(embeds.shape) != needed:
            raise StoreError(f"embeds: got shape {list(embeds.shape)}, needs {needed}, one row for each chunk")
        rows = embeds.detach().to("cpu", self.dtype)
        bad = (~rows.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            owner = int(np.searchsorted(np.cumsum(list(map(len, chunks))), bad[0], side="right"))
            raise StoreError(
                f"embeds: row {bad[0]}, of passage {_name(passages[owner], owner)}, isn't finite in {self.dtype}"
            )
        return rows

    def _keys_of_aliases(self, state: StoreState, new: Collection[bytes], aliases: Sequence[Passage]) -> list[bytes]:
        keys = [self._key(alias.text) for alias in aliases]
        for index, (alias, place) in enumerate(zip(aliases, state.find(keys))):
            if place < 0 and keys[index] not in new:
                raise StoreError(f"aliases: the text of passage {_name(alias, index)} is not in the store")
        return keys

    def _key(self, text: str) -> bytes:
        return hashlib.blake2b(encode_text(text), digest_size=KEY_BYTES, key=self.fingerprint.digest).digest()

    def _places(self, state: StoreState, passages: Sequence[Passage]) -> np.ndarray:
        """Return the number of each passage, or -1 for an unknown one."""
        by_id = [passage.id for passage in passages if not passage.text and passage.id is not None]
        of_ids: dict[str | None, bytes | None] = dict(zip(by_id, state.keys_of_ids(by_id))) if by_id else {}
        # All zeros marks an unknown id: no passage has this key, but for a chance of 1 in 2 ** 128.
        nothing = bytes(KEY_BYTES)
        keys = [self._key(passage.text) if passage.text else of_ids.get(passage.id) or nothing for passage in passages]
        return state.find(keys)

    def _locate(self, passages: Sequence[Passage]) -> list[tuple[Shard, int]]:
        """Return each passage's shard and its number in the shard."""
        for index, passage in enumerate(passages):
            if not passage.text and passage.id is None:
                raise StoreError(f"passage {index}: has neither text nor id, needs one of the two")
        state = self._state
        places = self._places(state, passages)
        if len(places) and places.min() < 0:
            raise UnknownPassageError(self._unknown(state, passages, places))
        return state.owners(places)

    def _unknown(self, state: StoreState, passages: Sequence[Passage], places: np.ndarray) -> str:
        index = int(np.argmax(places < 0))
        passage = passages[index]
        has = f"store {self.folder}, which has {len(state.passages):,} passages"
        others = f" (nor are {int((places < 0).sum()) - 1} others)" if (places < 0).sum() > 1 else ""
        if not passage.text:
            return f"passage id {passage.id!r}: is not in {has}{others}"
        known = passage.id is not None and state.keys_of_ids([passage.id])[0] is not None
        note = "; its id belongs to another text" if known else ""
        return f"passage {_name(passage, index)}: its text is not in {has}{others}{note}"


def _not_a_store(folder: Path) -> StoreError:
    return StoreError(f"store {folder}: is not a store, it has no {_MANIFEST}")


def _require(folder: Path, held: Fingerprint, got: Fingerprint) -> None:
    if held.digest != got.digest:
        raise StoreError(f"store {folder}: " + "; ".join(held.differences(got)))


def _name(passage: Passage, index: int) -> str:
    return repr(passage.id if passage.id is not None else index)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Hold the writer's lock, which the operating system releases if the process dies."""
    try:
        lock = open(folder / ".lock", "w")
    except FileNotFoundError:
        raise _not_a_store(folder) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
