"""What the readers of a store see: its shards, and where in them each passage and each id is."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from refrag.store.key_index import KEY_BYTES, KeyIndex
from refrag.store.shard import Shard, encode_text


@dataclasses.dataclass(frozen=True)
class StoreState:
    """Some shards; replaced as a whole by one with more of them, so that threads never see half a refresh.

    Attributes
    ----------
    names : tuple of str
        The shards' files, in the order in which they were written.
    shards : tuple of Shard
    starts : tuple of int
        The number of each shard's first passage, counted through all shards.
    passages : KeyIndex
        From a passage's key to its number.
    ids : KeyIndex
        From an id's key to a row of ``id_passages``.
    id_passages : array, uint8 [M, 16]
        Keys of the passages that ids stand for.
    """

    names: tuple[str, ...] = ()
    shards: tuple[Shard, ...] = ()
    starts: tuple[int, ...] = ()
    passages: KeyIndex = dataclasses.field(default_factory=KeyIndex)
    ids: KeyIndex = dataclasses.field(default_factory=KeyIndex)
    id_passages: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, KEY_BYTES), np.uint8))

    def extended(self, names: Sequence[str], shards: Sequence[Shard]) -> StoreState:
        """Return a state with further shards."""
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
        """Return the number of the passage with each key, int64 [n], -1 where there is none."""
        return self.passages.find(b"".join(keys))

    def keys_of_ids(self, ids: Sequence[str]) -> list[bytes | None]:
        """Return the key of the passage that each id stands for, None for an unknown one."""
        places = self.ids.find(b"".join(map(key_of_id, ids)))
        return [self.id_passages[place].tobytes() if place >= 0 else None for place in places]

    def owners(self, numbers: np.ndarray) -> list[tuple[Shard, int]]:
        """Return the shard of each passage, and its number there."""
        owners = np.searchsorted(self.starts, numbers, side="right") - 1
        return [
            (self.shards[owner], number - self.starts[owner])
            for owner, number in zip(owners.tolist(), numbers.tolist())
        ]


def key_of_id(id: str) -> bytes:
    """Return the digest by which an id is found."""
    return hashlib.blake2b(encode_text(id), digest_size=KEY_BYTES).digest()
