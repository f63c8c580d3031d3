"""KVEncoder: reads passages with the decoder into the keys and values that a KVStore contains."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from refrag.encoding.store_filler import StoreFiller
from refrag.model.inputs import Chunk, Passage
from refrag.model.modeling import RefragForCausalLM
from refrag.model.passage_reading import read_passages
from refrag.model.passage_rows import PassageEntry
from refrag.processing.processor import RefragProcessor
from refrag.store.fingerprint import KVFingerprint
from refrag.store.kv_store import KVStore

_BATCH_TOKENS = 8192
# A passage of 400 tokens at k = 8 takes 1.2 MB for SmolLM2-135M, and k times that with all rows.
_MOST_PASSAGES, _MOST_FULL_PASSAGES = 256, 32


class KVEncoder(StoreFiller[KVStore]):
    """Splits passages as the processor does and reads them as the model does.

    Parameters
    ----------
    model : RefragForCausalLM
        In eval mode, with ``slots="kv"``.
    processor : RefragProcessor
        With the model's key/value slots.
    shared_text : sequence of int, optional
        Tokens of the text before the passages in the prompts to come. Defaults to ``processor.shared_text()``.
    full : bool
        Whether to keep all rows as well, for a store that holds them.
    batch_tokens : int
        Maximum number of passage tokens in a pass of the decoder, unless a single passage has more.

    Attributes
    ----------
    fingerprint : KVFingerprint
        Computed from the decoder when this object was created.

    Raises
    ------
    ValueError
        If the model has other slots than the processor or is in training mode, its keys can't be moved,
        ``batch_tokens`` is below 1, or the processor's chunker has no description.

    Examples
    --------
    >>> encoder = KVEncoder(model, processor)  # doctest: +SKIP
    >>> store = KVStore.create("store", encoder.fingerprint)  # doctest: +SKIP
    >>> encoder.fill(store, [Passage("The bridge of Orla was built in 1871.", "orla")])  # doctest: +SKIP
    PutCounts(new=1, known=0, moved_ids=0)
    """

    def __init__(
        self,
        model: RefragForCausalLM,
        processor: RefragProcessor,
        shared_text: Sequence[int] | None = None,
        *,
        full: bool = False,
        batch_tokens: int = _BATCH_TOKENS,
    ) -> None:
        rule = model.config.kv_slots
        if rule is None or processor.kv_slots != rule:
            raise ValueError(f"processor: got slots {processor.kv_slots}, needs the model's key/value slots, {rule}")
        if model.training:
            raise ValueError("model: is in training mode, needs model.eval(): dropout would change the stored rows")
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens: got {batch_tokens}, needs 1 or more")
        self.model = model
        self.processor = processor
        self.rule = rule
        self.rotation = model.key_rotation
        self.shared_text = list(processor.shared_text() if shared_text is None else shared_text)
        self.full = full
        self.batch_tokens = batch_tokens
        self.most_passages = _MOST_FULL_PASSAGES if full else _MOST_PASSAGES
        self.fingerprint = KVFingerprint.of(model.decoder, processor, rule, self.shared_text)

    def encode(self, passages: Sequence[Passage]) -> tuple[list[list[Chunk]], list[PassageEntry]]:
        """Split passages into chunks and read them.

        Returns
        -------
        list of lists of Chunk
            The chunks of each passage.
        list of PassageEntry
            The rows of each passage.

        Raises
        ------
        ValueError
            If a passage has no text, or as ``read_passages``.
        PromptTooLongError
            If a passage doesn't fit into the decoder's window.
        """
        chunks = self.split(passages)
        with torch.inference_mode():
            entries = read_passages(
                self.model, self.rotation, chunks, self.shared_text, self.rule,
                full=self.full, batch_rows=self.batch_tokens,
            )  # fmt: skip
        return chunks, entries
