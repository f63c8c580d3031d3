"""PassageEncoder: encodes passages into the chunk embeddings that a store contains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from refrag import deprecated
from refrag.encoding.store_filler import StoreFiller
from refrag.model.acceptance import reading_of
from refrag.model.config import RefragConfig
from refrag.model.encoder import encode_packed, pack_texts
from refrag.model.inputs import Chunk, Passage
from refrag.model.modeling import RefragForCausalLM
from refrag.processing.processor import RefragProcessor
from refrag.store.fingerprint import Fingerprint
from refrag.store.store import ChunkStore

_BATCH_TOKENS = 8192  # 455 chunks of 16 tokens plus two special ones: on a CPU, larger batches are no faster


class PassageEncoder(StoreFiller[ChunkStore]):
    """Splits passages as the processor does and encodes the chunks as the model does, without a decoder.

    Parameters
    ----------
    encoder : PreTrainedModel
        In eval mode; with attention "refrag" if it reads packed rows.
    processor : RefragProcessor
    config : RefragConfig
        Only its pooling is used.
    batch_tokens : int
        Maximum number of encoder tokens in a batch, unless a single chunk or window has more; these are never split.

    Attributes
    ----------
    fingerprint : Fingerprint
        Computed from the encoder when this object was created.

    Raises
    ------
    ValueError
        If the encoder's attention isn't "refrag", the encoder is refused or in training mode, ``batch_tokens`` is
        below 1, or the processor's chunker has no description.

    Examples
    --------
    >>> encoder = PassageEncoder.from_model(model, processor)  # doctest: +SKIP
    >>> store = ChunkStore.create("store", encoder.fingerprint)  # doctest: +SKIP
    >>> encoder.fill(store, [Passage("The bridge of Orla was built in 1871.", "orla")])  # doctest: +SKIP
    PutCounts(new=1, known=0, moved_ids=0)
    >>> prompt = processor([Passage(id="orla"), "When was it built?"], store=store)  # doctest: +SKIP
    >>> model.generate(prompt, max_new_tokens=32)  # doctest: +SKIP
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        processor: RefragProcessor,
        config: RefragConfig,
        *,
        batch_tokens: int = _BATCH_TOKENS,
    ) -> None:
        reading_of(encoder)
        if encoder.training:
            raise ValueError(
                "encoder: is in training mode, needs encoder.eval(): dropout would change the stored embeddings"
            )
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens: got {batch_tokens}, needs 1 or more")
        self.encoder = encoder
        self.processor = processor
        self.config = config
        self.batch_tokens = batch_tokens
        self.fingerprint = Fingerprint.of(encoder, processor, config)

    recipe = deprecated.renamed_attribute("recipe", "fingerprint")

    @classmethod
    def from_model(
        cls, model: RefragForCausalLM, processor: RefragProcessor, *, batch_tokens: int = _BATCH_TOKENS
    ) -> PassageEncoder:
        """Create a passage encoder from a model's encoder and config."""
        return cls(model.encoder, processor, model.config, batch_tokens=batch_tokens)

    def encode(self, passages: Sequence[Passage]) -> tuple[list[list[Chunk]], torch.Tensor]:
        """Split passages into chunks and encode them.

        Returns
        -------
        list of lists of Chunk
            The chunks of each passage.
        Tensor [N, d_enc]
            The embeddings of all chunks, in order.

        Raises
        ------
        ValueError
            If a passage has no text, or a chunk is too long for the encoder.
        """
        chunks = self.split(passages)
        texts = pack_texts(
            self.processor.encoder_tokenizer,
            [chunk.text for own in chunks for chunk in own],
            special_tokens=self.processor.encoder_special_tokens,
            window=self.processor.encoder_window,
            passages=[number for number, own in enumerate(chunks) for _ in own],
        )
        lengths = texts.layout.chunk_offsets.diff()
        rows = torch.empty(len(lengths), self.fingerprint.width, dtype=self.encoder.dtype, device="cpu")
        # Chunks of one window stay in one batch.
        window_of_chunk = torch.arange(len(lengths), device="cpu") if texts.windows is None else texts.windows.long()
        windows = window_of_chunk.bincount() if len(lengths) else window_of_chunk
        members = torch.arange(len(lengths), device="cpu").split(windows.tolist())
        tokens = torch.zeros(len(windows), dtype=torch.int64, device="cpu").index_add_(
            0, window_of_chunk, lengths.long()
        )
        with torch.inference_mode():
            for numbers in _batches(tokens, self.batch_tokens):
                picked = torch.cat([members[number] for number in numbers]).tolist()
                batch = texts.take(picked)
                rows[picked] = encode_packed(self.encoder, batch, self.config.pooling, self.config.pool_segments).to(
                    "cpu"
                )
        return chunks, rows


def _batches(lengths: torch.Tensor, most: int) -> Iterator[list[int]]:
    """Yield batches of chunk or window indices, sorted by length in descending order.

    The largest batch comes first, so that an out-of-memory error occurs immediately if at all.
    """
    batch: list[int] = []
    tokens = 0
    order = lengths.argsort(descending=True, stable=True)
    for index, length in zip(order.tolist(), lengths[order].tolist()):
        if batch and tokens + length > most:
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += length
    if batch:
        yield batch
