"""A snapshot of a store's shards, with an index of their passages and ids."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from refrag.store.key_index import KEY_BYTES, KeyIndex
from refrag.store.shard import Shard, encode_text


@dataclasses.dataclass(frozen=True)
class StoreState:
    """An immutable set of shards; a refresh replaces it as a whole, so that threads never see a partial refresh.

    Attributes
    ----------
    names : tuple of str
        File names of the shards, in the order of writing.
    shards : tuple of Shard
    starts : tuple of int
        The number of each shard's first passage, counted across shards.
    passages : KeyIndex
        Maps a passage's key to its number.
    ids : KeyIndex
        Maps an id's key to a row of ``id_passages``.
    id_passages : array, uint8 [M, 16]
        Key of each id's passage.
    """

    names: tuple[str, ...] = ()
    shards: tuple[Shard, ...] = ()
    starts: tuple[int, ...] = ()
    passages: KeyIndex = dataclasses.field(default_factory=KeyIndex)
    ids: KeyIndex = dataclasses.field(default_factory=KeyIndex)
    id_passages: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, KEY_BYTES), np.uint8))

    def extended(self, names: Sequence[str], shards: Sequence[Shard]) -> StoreState:
        """Return a state with additional shards."""
        counts = [len(shard.keys) for shard in shards]
        starts = len(self.passages) + np.cumsum([0, *counts[:-1]])
        return StoreState(
            (*self.names, *names),
            (*self.shards, *shards),
            (*self.starts, *starts.tolist()),
            self.passages.extended([shard.keys for shard in shards]),
            self.ids.extended([shard.id_keys for shard in shards]),
            np.concatenate([self.id_passages, *(shard.id_passages for shard in shards)]),
        )

    def find(self, keys: Sequence[bytes]) -> np.ndarray:
        """Return the number of the passage with each key, int64 [n], or -1 if there is none."""
        return self.passages.find(b"".join(keys))

    def keys_of_ids(self, ids: Sequence[str]) -> list[bytes | None]:
        """Return the key of each id's passage, or None for an unknown id."""
        places = self.ids.find(b"".join(map(key_of_id, ids)))
        return [self.id_passages[place].tobytes() if place >= 0 else None for place in places]

    def owners(self, numbers: np.ndarray) -> list[tuple[Shard, int]]:
        """Return each passage's shard and its number in the shard."""
        owners = np.searchsorted(self.starts, numbers, side="right") - 1
        return [
            (self.shards[owner], number - self.starts[owner])
            for owner, number in zip(owners.tolist(), numbers.tolist())
        ]


def key_of_id(id: str) -> bytes:
    """Return the key of an id, a digest."""
    return hashlib.blake2b(encode_text(id), digest_size=KEY_BYTES).digest()
