"""PassageStore: what is stored of passages, in immutable shards, keyed by the content that it was computed from."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
import torch

from refrag.model.inputs import Chunk, Passage
from refrag.store.fingerprint import PassageFingerprint
from refrag.store.key_index import KEY_BYTES
from refrag.store.shard import Shard, StoreError, encode_text, publish, write_shard
from refrag.store.store_state import StoreState, key_of_id

if TYPE_CHECKING:
    from typing_extensions import Self

_FORMAT = 1
_MANIFEST = "store.json"
_EMBEDDINGS = "embeddings"  # what a store holds whose manifest, of the first version, doesn't say it

AnyFingerprint = TypeVar("AnyFingerprint", bound=PassageFingerprint)


class UnknownPassageError(StoreError):
    """Raised if a passage isn't in the store."""


class PutCounts(NamedTuple):
    """Counts of a ``put``: new passages, known passages, and ids that referred to another text before."""

    new: int
    known: int
    moved_ids: int


class PassageStore(Generic[AnyFingerprint]):
    """The part of a store that doesn't depend on what it holds of a passage: see ``ChunkStore`` and ``KVStore``.

    A passage's key is blake2b over its text, keyed by the digest of the store's fingerprint. The store also contains
    the chunks' text and tokens.

    One process writes at a time while others wait for the lock; any number of processes read concurrently. A shard is
    written to a temporary file, synced and renamed, so a killed writer leaves all earlier shards intact and no partial
    shard. Readers see later shards after ``refresh``.
    """

    content: ClassVar[str]  # what it holds, for messages and the manifest
    dtypes: ClassVar[dict[str, torch.dtype]]
    fingerprint_type: ClassVar[type[PassageFingerprint]]

    def __init__(self, folder: Path, fingerprint: AnyFingerprint, dtype: torch.dtype, **settings: Any) -> None:
        self.folder = folder.absolute()  # the same from any working directory
        self.fingerprint = fingerprint
        self.dtype = dtype
        self.settings = settings
        self._state = StoreState()
        self._refreshing = threading.Lock()
        self.refresh()

    @classmethod
    def _create(
        cls, folder: str | os.PathLike[str], fingerprint: AnyFingerprint, dtype: torch.dtype, **settings: Any
    ) -> Self:
        root = Path(folder)
        names = {value: name for name, value in cls.dtypes.items()}
        if dtype not in names:
            raise StoreError(f"dtype: got {dtype}, needs one of {', '.join(cls.dtypes)}")
        root.mkdir(parents=True, exist_ok=True)
        with _writing(root):
            if (root / _MANIFEST).exists():
                raise StoreError(f"store {root}: exists already, open it with {cls.__name__}.open")
            content = {} if cls.content == _EMBEDDINGS else {"content": cls.content}
            recipe = fingerprint.fields()
            manifest = {"format": _FORMAT, **content, "dtype": names[dtype], **settings, "recipe": recipe}
            part = root / f".part-{_MANIFEST}"
            part.write_text(json.dumps(manifest, indent=2) + "\n")
            publish(part, root / _MANIFEST)
        return cls(root, fingerprint, dtype, **settings)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], fingerprint: AnyFingerprint | None = None) -> Self:
        """Open a store.

        Parameters
        ----------
        folder : path
        fingerprint : optional
            The fingerprint that the store must have. Without it, nothing is compared.

        Raises
        ------
        StoreError
            If there is no store, it holds something else, its fingerprint differs (states the differences), or a shard
            is damaged.
        """
        root = Path(folder)
        try:
            manifest = json.loads((root / _MANIFEST).read_text())
            if (version := manifest.pop("format")) != _FORMAT:
                raise StoreError(f"store {root}: has format {version}, needs {_FORMAT}")
            content = manifest.pop("content", _EMBEDDINGS)
            if content != cls.content:
                raise StoreError(f"store {root}: holds {content}, needs {cls.content} for a {cls.__name__}")
            held, dtype = cls.fingerprint_type(**manifest.pop("recipe")), cls.dtypes[manifest.pop("dtype")]
        except FileNotFoundError:
            raise _not_a_store(root) from None
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise StoreError(f"store {root}: its {_MANIFEST} can't be read ({error})") from error
        _require(root, held, fingerprint or held)
        return cls(root, held, dtype, **manifest)  # type: ignore[arg-type]  # of the class's own type

    def require(self, fingerprint: AnyFingerprint) -> None:
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
        return f"{type(self).__name__}({str(self.folder)!r}, {len(self):,} passages of {self.fingerprint.model_name})"

    def __reduce__(self):
        return type(self).open, (self.folder, self.fingerprint)

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

    def _put(
        self,
        passages: Sequence[Passage],
        chunks: Sequence[Sequence[Chunk]],
        payload_of: Callable[[list[int]], dict[str, torch.Tensor]],
        aliases: Sequence[Passage],
    ) -> PutCounts:
        """Add passages as one shard, except those whose text is in the store already; see ``ChunkStore.put``.

        ``payload_of`` returns the tensors to store of the passages with the given indices.
        """
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
                    payload_of(new),
                    list(ids),
                    [key_of_id(name) for name in ids],
                    list(ids.values()),
                )
        self.refresh()
        return counts

    def _check_passages(self, passages: Sequence[Passage], chunks: Sequence[Sequence[Chunk]]) -> None:
        """Check the passages and chunks of ``put``."""
        if len(chunks) != len(passages):
            raise StoreError(f"chunks: got {len(chunks)} lists, needs {len(passages)}, one for each passage")
        for index, (passage, own) in enumerate(zip(passages, chunks)):
            if not passage.text.strip():
                raise StoreError(f"passage {name_of(passage, index)}: has no text")
            if "".join(chunk.text for chunk in own) != passage.text:
                raise StoreError(f"passage {name_of(passage, index)}: its chunks together are not its text")

    def _keys_of_aliases(self, state: StoreState, new: Collection[bytes], aliases: Sequence[Passage]) -> list[bytes]:
        keys = [self._key(alias.text) for alias in aliases]
        for index, (alias, place) in enumerate(zip(aliases, state.find(keys))):
            if place < 0 and keys[index] not in new:
                raise StoreError(f"aliases: the text of passage {name_of(alias, index)} is not in the store")
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
        return f"passage {name_of(passage, index)}: its text is not in {has}{others}{note}"


def _not_a_store(folder: Path) -> StoreError:
    return StoreError(f"store {folder}: is not a store, it has no {_MANIFEST}")


def _require(folder: Path, held: PassageFingerprint, got: PassageFingerprint) -> None:
    if held.digest != got.digest:
        raise StoreError(f"store {folder}: " + "; ".join(held.differences(got)))


def name_of(passage: Passage, index: int) -> str:
    """Return a passage's id, or its index, for messages."""
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
