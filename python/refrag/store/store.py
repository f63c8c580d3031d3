"""ChunkStore: chunk embeddings on disk, keyed by the content that they were computed from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from refrag import deprecated
from refrag.model.inputs import Chunk, Passage
from refrag.store.fingerprint import Fingerprint
from refrag.store.passage_store import PassageStore, PutCounts, name_of
from refrag.store.passage_store import UnknownPassageError as UnknownPassageError
from refrag.store.shard import StoreError

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


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


class ChunkStore(PassageStore[Fingerprint]):
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

    content = "embeddings"
    dtypes = DTYPES
    fingerprint_type = Fingerprint

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
        return cls._create(folder, fingerprint, dtype)

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
            If there is no store, it holds something else, its fingerprint differs (states the differences), or a shard
            is damaged.
        """
        return super().open(folder, fingerprint)

    @deprecated.renamed_keyword("recipe", "fingerprint")
    def require(self, fingerprint: Fingerprint) -> None:
        """Refuse a fingerprint other than the store's; see ``open``."""
        super().require(fingerprint)

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
            parts.append(shard.payload["rows"][first:last])
            offsets.append(offsets[-1] + last - first)
        rows = torch.cat(parts) if parts else torch.empty(0, self.fingerprint.width, dtype=self.dtype, device="cpu")
        return PassageEmbeds(rows, offsets)

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
        self._check_passages(passages, chunks)
        needed = [sum(map(len, chunks)), self.fingerprint.width]
        if list(embeds.shape) != needed:
            raise StoreError(f"embeds: got shape {list(embeds.shape)}, needs {needed}, one row for each chunk")
        rows = embeds.detach().to("cpu", self.dtype)
        bad = (~rows.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            owner = int(np.searchsorted(np.cumsum(list(map(len, chunks))), bad[0], side="right"))
            raise StoreError(
                f"embeds: row {bad[0]}, of passage {name_of(passages[owner], owner)}, isn't finite in {self.dtype}"
            )
        ends = np.cumsum([0, *map(len, chunks)]).tolist()

        def payload_of(new: list[int]) -> dict[str, torch.Tensor]:
            return {"rows": torch.cat([rows[:0], *(rows[ends[index] : ends[index + 1]] for index in new)])}

        return self._put(passages, chunks, payload_of, aliases)
