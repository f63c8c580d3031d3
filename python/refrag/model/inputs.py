"""The parts of a prompt: text, passages and chunks, and the packed batch that the model reads."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch

from refrag.model.passage_rows import PassageEntry, SlotRule
from refrag_kernels import ChunkLayout


class PromptTooLongError(ValueError):
    """Raised if a prompt doesn't fit into the decoder's context window."""


@dataclasses.dataclass(frozen=True)
class Passage:
    """A retrieved text, which may be compressed.

    Attributes
    ----------
    text : str
        The text. It may only be empty if a ``ChunkStore`` finds the passage by its id.
    id : str or None
        Identifies the passage's source.

    Raises
    ------
    TypeError
        If ``text`` or ``id`` has another type.
    """

    text: str = ""
    id: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TypeError(f"passage: text: got {type(self.text).__name__}, needs str")
        if not isinstance(self.id, (str, type(None))):
            raise TypeError(f"passage: id: got {type(self.id).__name__}, needs str or None")


Part = str | Passage  # an element of a prompt


def require_text(text: object, name: str, needs: str = "str") -> None:
    """Refuse a value that isn't text for a tokenizer.

    Raises
    ------
    TypeError
        If it isn't a string. The message contains ``name``.
    ValueError
        If it contains half a surrogate pair.
    """
    if not isinstance(text, str):
        raise TypeError(f"{name}: got {type(text).__name__}, needs {needs}")
    if (place := half_surrogate(text)) is not None:
        raise ValueError(f"{name}: contains half a surrogate pair at {place}, which isn't a character")


def half_surrogate(text: str) -> int | None:
    """Return the index of half a surrogate pair in a text, which JSON's escapes can produce; None if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of a passage: a slot per latent when compressed, its tokens when expanded.

    Attributes
    ----------
    text : str
        The exact text of the tokens.
    token_ids : tuple of int
        The decoder's tokens of the text.
    passage : str or None
        Id of the chunk's passage.

    Raises
    ------
    TypeError
        If the text or the id has another type.
    """

    text: str
    token_ids: tuple[int, ...]
    passage: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TypeError(f"chunk: text: got {type(self.text).__name__}, needs str")
        if not isinstance(self.passage, (str, type(None))):
            raise TypeError(f"chunk: passage: got {type(self.passage).__name__}, needs str or None")


@dataclasses.dataclass(frozen=True)
class PackedTexts:
    """Texts tokenized for the encoder and concatenated without padding.

    Attributes
    ----------
    token_ids : Tensor, int64 [R]
    layout : ChunkLayout
        One sequence with a chunk per text.
    windows : Tensor, int32 [N], optional
        Window of each text. Texts of one window are adjacent and attend to each other. Without it, each text is encoded
        on its own.

    Raises
    ------
    TypeError, ValueError
        If a field has another type, dtype or shape, or, on the CPU, a window's texts aren't adjacent.
    """

    token_ids: torch.Tensor
    layout: ChunkLayout
    windows: torch.Tensor | None = None

    def __post_init__(self) -> None:
        _require_layout(self.layout)
        if self.layout.num_sequences != 1:
            raise ValueError(f"layout: got {self.layout.num_sequences} sequences, needs one, with a chunk per text")
        _require_tensor("token_ids", self.token_ids, torch.int64, self.layout.total_rows)
        if self.windows is not None:
            _require_tensor("windows", self.windows, torch.int32, self.layout.num_chunks)
            if self.windows.device.type == "cpu":
                runs = self.windows.unique_consecutive()
                if len(runs) != len(runs.unique()):
                    raise ValueError(f"windows: got {self.windows.tolist()}, needs adjacent texts in each window")

    def take(self, texts: Sequence[int]) -> PackedTexts:
        """Return some of the texts; those of one window still attend to each other, but not to omitted texts."""
        offsets = self.layout.host().chunk_offsets.tolist()
        lengths = [offsets[text + 1] - offsets[text] for text in texts]
        rows = [self.token_ids[offsets[text] : offsets[text + 1]] for text in texts]
        return PackedTexts(
            torch.cat(rows) if rows else self.token_ids[:0],
            ChunkLayout.from_lengths([lengths]).to(self.token_ids.device),
            None if self.windows is None else self.windows[list(texts)],
        )

    def to(self, device: torch.device | str) -> PackedTexts:
        """Return the texts on ``device``."""
        windows = None if self.windows is None else self.windows.to(device)
        return PackedTexts(self.token_ids.to(device), self.layout.to(device), windows)


@dataclasses.dataclass(frozen=True)
class MixedPrompt:
    """A packed batch of prompts: the decoder's rows and the encoder's chunks.

    Attributes
    ----------
    token_ids : Tensor, int64 [T]
        Token of each row; 0 for a slot.
    slot_of_row : Tensor, int32 [T]
        Index of the embedding in this row: c * m + j for latent j of chunk c, with m latents; -1 for text.
    position_ids : Tensor, int64 [T]
    layout : ChunkLayout
        The sequences and their spans: text, slots and expanded chunks.
    passage_of_span : Tensor, int32 [C]
        Passage of each span of the layout, numbered per sequence; -1 for text.
    chunks : tuple of Chunk
        All N chunks of the batch, expanded or not.
    expanded : frozenset of int
        Indices of the expanded chunks.
    encoder_input : PackedTexts
        The encoder's tokens of the N chunks; empty if ``chunk_embeds`` is given.
    chunk_embeds : Tensor [N, d_enc], optional
        The chunks' embeddings if they are known, for example from a ``ChunkStore``.
    latents : int
        m, the number of slots of a compressed chunk.
    kv_slots : SlotRule, optional
        For slots of keys and values: which rows they keep. ``slot_of_row`` then only marks the slots, of which a chunk
        of fewer than m tokens has fewer, and each row of a passage has the position of its own token.
    passages : tuple of PassageEntry, optional
        With ``kv_slots``: the keys and values of all passages of the batch, if they are known.

    Raises
    ------
    TypeError, ValueError
        If a field has another type, dtype or shape than the others need; names it.
    """

    token_ids: torch.Tensor
    slot_of_row: torch.Tensor
    position_ids: torch.Tensor
    layout: ChunkLayout
    passage_of_span: torch.Tensor
    chunks: tuple[Chunk, ...]
    expanded: frozenset[int]
    encoder_input: PackedTexts
    chunk_embeds: torch.Tensor | None = None
    latents: int = 1
    kv_slots: SlotRule | None = None
    passages: tuple[PassageEntry, ...] | None = None

    def __post_init__(self) -> None:
        _require_layout(self.layout)
        rows, count = self.layout.total_rows, len(self.chunks)
        _require_tensor("token_ids", self.token_ids, torch.int64, rows)
        _require_tensor("slot_of_row", self.slot_of_row, torch.int32, rows)
        _require_tensor("position_ids", self.position_ids, torch.int64, rows)
        _require_tensor("passage_of_span", self.passage_of_span, torch.int32, self.layout.num_chunks)
        if not isinstance(self.encoder_input, PackedTexts):
            raise TypeError(f"encoder_input: got {type(self.encoder_input).__name__}, needs PackedTexts")
        if not isinstance(self.latents, int) or self.latents < 1:
            raise ValueError(f"latents: got {self.latents!r}, needs an integer of 1 or more")
        unknown = [chunk for chunk in self.expanded if not 0 <= chunk < count]
        if unknown:
            raise ValueError(f"expanded: got chunk {unknown[0]}, needs 0 to {count - 1}")
        texts, embeds = self.encoder_input.layout.num_chunks, self.chunk_embeds
        if texts != count and (texts or (embeds is None and self.kv_slots is None)):
            raise ValueError(
                f"encoder_input: got {texts} texts, needs {count}, one per chunk, or none with chunk_embeds or kv_slots"
            )
        if embeds is not None and (embeds.dim() != 2 or len(embeds) != count):
            raise ValueError(f"chunk_embeds: got shape {list(embeds.shape)}, needs [{count}, d_enc], one row per chunk")

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.token_ids.device

    def chunks_per_sequence(self) -> list[int]:
        """Return the number of chunks in each sequence."""
        passages = iter(self.passage_of_span.tolist())
        return [sum(next(passages) >= 0 for _ in lengths) for lengths in self.layout.lengths()]

    def take(self, spans: Sequence[int]) -> MixedPrompt:
        """Return the given spans of a single-sequence prompt, in this order; rows keep their positions.

        Parameters
        ----------
        spans : sequence of int
        """
        offsets = self.layout.host().chunk_offsets.tolist()
        passages = self.passage_of_span.tolist()
        chunk_of_span = list(itertools.accumulate((passage >= 0 for passage in passages), initial=0))
        chunks = [chunk_of_span[span] for span in spans if passages[span] >= 0]
        rows = torch.tensor(
            [row for span in spans for row in range(offsets[span], offsets[span + 1])],
            dtype=torch.int64,
            device=self.device,
        )
        latents = self.latents
        slots = torch.full((len(self.chunks) * latents + 1,), -1, dtype=torch.int32, device=self.device)  # -1 stays -1
        taken = [chunk * latents + latent for chunk in chunks for latent in range(latents)]
        slots[torch.tensor(taken, dtype=torch.int64, device=self.device)] = torch.arange(
            len(taken), dtype=torch.int32, device=self.device
        )
        given = self.chunk_embeds is not None or self.kv_slots is not None
        return MixedPrompt(
            token_ids=self.token_ids[rows],
            slot_of_row=slots[self.slot_of_row[rows].long()],
            position_ids=self.position_ids[rows],
            layout=ChunkLayout.from_lengths([[offsets[span + 1] - offsets[span] for span in spans]]).to(self.device),
            passage_of_span=self.passage_of_span[torch.tensor(spans, dtype=torch.int64, device=self.device)],
            chunks=tuple(self.chunks[chunk] for chunk in chunks),
            expanded=frozenset(index for index, chunk in enumerate(chunks) if chunk in self.expanded),
            encoder_input=self.encoder_input.take([] if given else chunks),
            chunk_embeds=None if self.chunk_embeds is None else self.chunk_embeds[chunks],
            latents=latents,
            kv_slots=self.kv_slots,
        )

    def to(self, device: torch.device | str) -> MixedPrompt:
        """Return the prompt on ``device``; ``passages`` stay where they are."""
        hosted = ("chunks", "expanded", "latents", "kv_slots", "passages")
        tensors = {
            field.name: getattr(self, field.name).to(device)
            for field in dataclasses.fields(self)
            if field.name not in hosted and getattr(self, field.name) is not None
        }
        return dataclasses.replace(self, **tensors)


def _require_layout(layout: object) -> None:
    if not isinstance(layout, ChunkLayout):
        raise TypeError(f"layout: got {type(layout).__name__}, needs a ChunkLayout")


def _require_tensor(name: str, tensor: object, dtype: torch.dtype, length: int) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, needs a Tensor")
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: got {tensor.dtype}, needs {dtype}")
    if list(tensor.shape) != [length]:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, needs [{length}], as the layout has it")
