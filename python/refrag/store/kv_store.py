"""KVStore: keys and values of passages on disk, keyed by the content that they were computed from."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch

from refrag.model.inputs import Chunk, Passage
from refrag.model.passage_rows import PassageEntry, PassageRows, all_rows
from refrag.store.fingerprint import KVFingerprint
from refrag.store.passage_store import PassageStore, PutCounts, name_of
from refrag.store.shard import Shard, StoreError

KV_DTYPES = {
    "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float8": torch.float8_e4m3fn,
}  # fmt: skip


class KVStore(PassageStore[KVFingerprint]):
    """Rows of keys and values of passages in immutable, memory-mapped safetensors shards.

    What ``ChunkStore`` is to embedding slots, this is to key/value slots: a passage is read by the decoder only once,
    and rows of another decoder, shared text, chunker or rule are never returned. Beside the rows of the slots, a store
    can hold all rows of its passages, so that expanding a chunk computes nothing.

    With dtype float8 (e4m3), each row of a head is divided by a factor, stored in float32, that maps its largest
    element to the largest number of float8.

    Use ``create`` or ``open`` to get a store, and ``KVEncoder.fill`` or ``refrag encode --slots kv`` to fill it.

    Attributes
    ----------
    full : bool
        Whether it holds all rows as well.

    Examples
    --------
    >>> import tempfile
    >>> fingerprint = KVFingerprint("tiny", "1", "2", "fixed, k = 2", "1", "received", rows=1, whole=0)
    >>> folder = tempfile.TemporaryDirectory()
    >>> store = KVStore.create(folder.name, fingerprint)
    >>> chunks = [Chunk("It ra", (5, 6)), Chunk("ined.", (7, 8))]
    >>> keys = values = torch.ones(3, 2, 2, 8)  # 3 layers, 2 heads, a row for each of 2 chunks, head_dim 8
    >>> rows = torch.tensor([0, 3], dtype=torch.int32).expand(3, 2, 2)
    >>> entry = PassageEntry(PassageRows(keys, values, rows, lengths=(2, 2), keep=(1, 1), start=1))
    >>> store.put([Passage("It rained.", "weather")], [chunks], [entry])
    PutCounts(new=1, known=0, moved_ids=0)
    >>> store.get_many([Passage(id="weather")])[0].slots.keys.shape
    torch.Size([3, 2, 2, 8])
    """

    content = "keys and values"
    dtypes = KV_DTYPES
    fingerprint_type = KVFingerprint

    @property
    def full(self) -> bool:
        """Whether the store holds all rows of its passages."""
        return bool(self.settings["full"])

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        fingerprint: KVFingerprint,
        dtype: torch.dtype = torch.bfloat16,
        *,
        full: bool = False,
    ) -> KVStore:
        """Create an empty store.

        Parameters
        ----------
        folder : path
            Created if it doesn't exist.
        fingerprint : KVFingerprint
        dtype : {torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn}
            Dtype of keys and values on disk.
        full : bool
            Whether to hold all rows as well.

        Raises
        ------
        StoreError
            If the folder already contains a store, or the dtype isn't supported.
        """
        return cls._create(folder, fingerprint, dtype, full=full)

    def get(self, passage: Passage) -> PassageEntry:
        """Return a passage's keys and values; see ``get_many``."""
        return self.get_many([passage])[0]

    def get_many(self, passages: Sequence[Passage]) -> list[PassageEntry]:
        """Return the keys and values of passages.

        Parameters
        ----------
        passages : sequence of Passage
            Each is found by its text, or by its id if it has no text.

        Returns
        -------
        list of PassageEntry
            Views of the mapped files, in the order of ``passages``: they must not be written to.

        Raises
        ------
        UnknownPassageError
            If a passage isn't in the store; names it.
        """
        return [self._entry(shard, place) for shard, place in self._locate(passages)]

    def _entry(self, shard: Shard, place: int) -> PassageEntry:
        lengths = shard.chunk_lengths(place)
        start = len(self.fingerprint.shared_tokens)
        payload = shard.payload
        layers, heads, head_dim = payload["shape"].tolist()
        first, last = payload["slot_offsets"][place : place + 2].tolist()
        keep = self.fingerprint.slot_rule.keep(lengths)

        def states(name: str, first: int, last: int) -> torch.Tensor:
            size = layers * heads * head_dim
            return payload[name][first * size : last * size].view(layers, heads, last - first, head_dim)

        def scale(name: str, first: int, last: int) -> torch.Tensor | None:
            if name not in payload:
                return None
            size = layers * heads
            return payload[name][first * size : last * size].view(layers, heads, last - first)

        rows = payload["slot_rows"][first * layers * heads : last * layers * heads].view(layers, heads, last - first)
        slots = PassageRows(
            states("slot_keys", first, last), states("slot_values", first, last), rows, lengths, keep, start,
            scale("slot_key_scale", first, last), scale("slot_value_scale", first, last),
        )  # fmt: skip
        if not self.full:
            return PassageEntry(slots)
        first, last = payload["full_offsets"][place : place + 2].tolist()
        full = all_rows(
            states("full_keys", first, last), states("full_values", first, last), lengths=lengths, start=start,
            key_scale=scale("full_key_scale", first, last), value_scale=scale("full_value_scale", first, last),
        )  # fmt: skip
        return PassageEntry(slots, full)

    def put(
        self,
        passages: Sequence[Passage],
        chunks: Sequence[Sequence[Chunk]],
        entries: Sequence[PassageEntry],
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
        entries : sequence of PassageEntry
            With all rows if the store holds them.
        aliases : sequence of Passage
            Additional ids for texts that are in the store or added by this call.

        Returns
        -------
        PutCounts

        Raises
        ------
        StoreError
            If the arguments are inconsistent or don't fit the store's fingerprint, a passage has no text, or a row
            isn't finite in the store's dtype. Nothing is written then.
        """
        self._check_passages(passages, chunks)
        if len(entries) != len(passages):
            raise StoreError(f"entries: got {len(entries)}, needs {len(passages)}, one for each passage")
        stored = [self._stored(name_of(*one), own, entry) for one, own, entry in zip(
            ((passage, index) for index, passage in enumerate(passages)), chunks, entries
        )]  # fmt: skip
        shapes = {tuple(entry.slots.keys.shape[axis] for axis in (0, 1, 3)) for entry in stored}
        if len(shapes) > 1:
            raise StoreError(f"entries: got rows of {sorted(shapes)} layers, heads and head_dim, needs one shape")
        shape = torch.tensor(shapes.pop() if shapes else (0, 0, 0), device="cpu")

        def payload_of(new: list[int]) -> dict[str, torch.Tensor]:
            slots = [stored[index].slots for index in new]
            payload = {"shape": shape, **_flat("slot", slots, self.dtype)}
            payload["slot_rows"] = torch.cat(
                [torch.empty(0, dtype=torch.int32, device="cpu"), *(one.rows.flatten() for one in slots)]
            )
            if self.full:
                payload |= _flat("full", [full for index in new if (full := stored[index].full)], self.dtype)
            return payload

        return self._put(passages, chunks, payload_of, aliases)

    def _stored(self, name: str, chunks: Sequence[Chunk], entry: PassageEntry) -> PassageEntry:
        """Check an entry and return it in the store's dtype."""
        lengths = tuple(len(chunk.token_ids) for chunk in chunks)
        needed = (lengths, self.fingerprint.slot_rule.keep(lengths), len(self.fingerprint.shared_tokens))
        slots = entry.slots
        if (slots.lengths, slots.keep, slots.start) != needed:
            raise StoreError(
                f"entries: passage {name}: got chunks of {list(slots.lengths)} tokens with {list(slots.keep)} rows "
                f"behind {slots.start} tokens, needs {list(needed[0])}, {list(needed[1])} and {needed[2]}"
            )
        if self.full and (entry.full is None or entry.full.keep != lengths):
            raise StoreError(f"entries: passage {name}: got no full rows, which the store {self.folder} holds")
        rows = [slots] if entry.full is None or not self.full else [slots, entry.full]
        if any(not part.finite_in(self.dtype) for part in rows):
            raise StoreError(f"entries: passage {name}: a row isn't finite in {self.dtype}")
        return PassageEntry(*(part.to("cpu", self.dtype) for part in rows))


def _flat(name: str, parts: Sequence[PassageRows], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the tensors of a shard for rows of passages, each passage in one piece."""
    ends = np.cumsum([0, *(part.keys.shape[2] for part in parts)])
    payload = {f"{name}_offsets": torch.from_numpy(ends.astype(np.int64))}
    for field in ("keys", "values", "key_scale", "value_scale"):
        tensors = [tensor.flatten() for part in parts if (tensor := getattr(part, field)) is not None]
        if tensors or not field.endswith("scale") or dtype == torch.float8_e4m3fn:
            empty = torch.empty(0, dtype=torch.float32 if field.endswith("scale") else dtype, device="cpu")
            payload[f"{name}_{field}"] = torch.cat(tensors) if tensors else empty
    return payload
