"""StoreFiller: adds the passages that a store lacks, a shard at a time."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from refrag.model.inputs import Chunk, Passage
from refrag.processing.processor import RefragProcessor
from refrag.store.kv_store import KVStore
from refrag.store.passage_store import PutCounts
from refrag.store.store import ChunkStore

AnyStore = TypeVar("AnyStore", ChunkStore, KVStore)


class StoreFiller(abc.ABC, Generic[AnyStore]):
    """Fills a store; subclasses compute what it holds of a passage."""

    processor: RefragProcessor
    fingerprint: Any
    most_passages = 1 << 30  # in a shard, whatever ``fill`` is asked for

    @abc.abstractmethod
    def encode(self, passages: Sequence[Passage]) -> tuple[Any, Any]:
        """Return the chunks of each passage and what the store holds of them, as its ``put`` takes them."""

    def split(self, passages: Sequence[Passage]) -> list[list[Chunk]]:
        """Return the chunks of each passage.

        Raises
        ------
        ValueError
            If a passage has no text.
        """
        for index, passage in enumerate(passages):
            if not passage.text.strip():
                raise ValueError(f"passage {passage.id or index!r}: has no text")
        return [self.processor.chunker(passage.text) for passage in passages]

    def fill(self, store: AnyStore, passages: Iterable[Passage], *, shard_passages: int = 4096) -> PutCounts:
        """Encode the passages that are missing in a store and add them, a shard at a time.

        Later calls skip finished shards, so an interrupted call can simply be repeated.

        Parameters
        ----------
        store : ChunkStore or KVStore
        passages : iterable of Passage
            Consumed lazily.
        shard_passages : int
            Maximum number of passages in a shard.

        Returns
        -------
        PutCounts

        Raises
        ------
        StoreError
            If the store has another fingerprint.
        ValueError
            As ``encode``.
        """
        return PutCounts(*map(sum, zip((0, 0, 0), *self.fill_steps(store, passages, shard_passages=shard_passages))))

    def fill_steps(
        self, store: AnyStore, passages: Iterable[Passage], *, shard_passages: int = 4096
    ) -> Iterator[PutCounts]:
        """Like ``fill``, but yield the counts of each shard once it is on disk."""
        if shard_passages < 1:
            raise ValueError(f"shard_passages: got {shard_passages}, needs 1 or more")
        store.require(self.fingerprint)
        passages = iter(passages)
        while read := list(itertools.islice(passages, min(shard_passages, self.most_passages))):
            missing = [read[index] for index in store.missing(read)]
            held = store.holds([Passage(passage.text) for passage in missing])
            new = list({passage.text: passage for passage, known in zip(missing, held) if not known}.values())
            counts = store.put(new, *self.encode(new), aliases=missing) if missing else PutCounts(0, 0, 0)
            yield counts._replace(known=len(read) - counts.new)
