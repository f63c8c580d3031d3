"""Converts a request's passages to vLLM's multimodal inputs, one item per passage."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature
from vllm.inputs.engine import tokens_input
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataItems, MultiModalDataParser, ProcessorBatchItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdateDetails,
)

from refrag.integrations.prompt_embeds import require_plain_decoder
from refrag.integrations.vllm.folder_encoder import FolderEncoder
from refrag.integrations.vllm.passages import MARK, MODALITY, GivenPassage, parse_passage
from refrag.integrations.vllm.reading import ReadPassage, read_passages
from refrag.model.encoder import TextEmbedder
from refrag.processing.processor import RefragProcessor
from refrag.store.fingerprint import Fingerprint
from refrag.store.store import ChunkStore

ENCODER_ROWS = 8192  # maximum rows of an encoder pass, which limits its memory for any request

_FIELDS = (
    "encoder_ids",
    "encoder_lengths",
    "encoder_windows",
    "encoder_slots",
    "embeds",
)  # fields of a ReadPassage that are sent to the worker


class PassageItems(ProcessorBatchItems[Any]):
    """Passages of a request: GivenPassage after parsing, ReadPassage once chunks are selected."""

    def __init__(self, passages: Sequence[GivenPassage | ReadPassage]) -> None:
        super().__init__(passages, MODALITY)

    def get_item_for_hash(self, index: int) -> object:
        # The prefix cache identifies blocks by this value, so it must include everything that the rows depend on.
        return self.data[index].content()


class PassageParser(MultiModalDataParser):
    """Reads ``multi_modal_data={"passage": [...]}``."""

    def __init__(self, width: int, takes_embeds: bool) -> None:
        super().__init__()
        self.width = width
        self.takes_embeds = takes_embeds

    def _get_subparsers(self) -> Mapping[str, Any]:
        return {**super()._get_subparsers(), MODALITY: self._parse_passages}

    def _parse_passages(self, data: Any) -> PassageItems | None:
        items = [data] if isinstance(data, (str, Mapping, GivenPassage)) else data
        if isinstance(items, torch.Tensor):
            items = [items] if items.dim() == 2 else list(items)
        if not isinstance(items, (list, tuple)):
            raise ValueError(f"passage: got {type(data).__name__}, needs a list of passages")
        if not items:
            return None
        passages = (GivenPassage, ReadPassage)
        return PassageItems(
            [
                item
                if isinstance(item, passages)
                else parse_passage(item, index, self.width, takes_embeds=self.takes_embeds)
                for index, item in enumerate(items)
            ]
        )


class PassageInfo(BaseProcessingInfo):
    """The model folder's information about passages."""

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)
        require_plain_decoder(self.get_hf_config())

    @property
    def width(self) -> int:
        """d_enc."""
        return self.get_hf_config().chunk_width

    @functools.cached_property
    def processor(self) -> RefragProcessor:
        """The processor saved with the model."""
        try:
            saved = RefragProcessor.from_pretrained(self.model_id)
        except FileNotFoundError as error:
            raise ValueError(
                f"model: {self.model_id} has no {error.filename}; write it with RefragProcessor.save_pretrained"
            ) from None
        if saved.latents != (needed := self.get_hf_config().latents):
            raise ValueError(f"model: {self.model_id} has a processor of {saved.latents} latents, needs {needed}")
        if saved.kv_slots is not None:
            raise ValueError(f"model: {self.model_id} has key/value slots, needs embedding slots for vLLM")
        return saved

    @functools.cached_property
    def store(self) -> ChunkStore | None:
        """The server's chunk store: ``--mm-processor-kwargs '{"store": "folder"}'``."""
        folder = (self.ctx.get_mm_config().mm_processor_kwargs or {}).get("store")
        if folder is None:
            return None
        fingerprint = Fingerprint.of(self._encoder.encoder, self.processor, self.get_hf_config())
        return ChunkStore.open(folder, fingerprint)

    def options(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Merge a request's options into the server's.

        Raises
        ------
        ValueError
            If a request names a store, which only the server's options may.
        """
        if "store" in asked:
            raise ValueError("store: got a value in a request, needs to be set when the server is started")
        own = dict(self.ctx.get_mm_config().mm_processor_kwargs or {})
        own.pop("store", None)
        return {**own, **asked}

    def embedder(self) -> TextEmbedder:
        """Return the embedder for selectors; loads the encoder on first use."""
        return self._embedder

    @functools.cached_property
    def _encoder(self) -> FolderEncoder:
        return FolderEncoder(self.model_id)

    @functools.cached_property
    def _embedder(self) -> TextEmbedder:
        return TextEmbedder(self._encoder, self.processor.encoder_tokenizer)

    def get_data_parser(self) -> PassageParser:
        return PassageParser(self.width, self.ctx.get_mm_config().enable_mm_embeds)

    def parse_mm_data(self, mm_data: Any, *, validate: bool = True) -> MultiModalDataItems:
        items = super().parse_mm_data(mm_data, validate=validate)
        if validate and not self.ctx.get_mm_config().enable_mm_embeds:
            for index, item in enumerate(items.get(MODALITY, ())):
                if item.embeds is not None:  # parsed by a caller in this process
                    raise ValueError(f"passage {index}: embeds: needs a server that runs with --enable-mm-embeds")
        return items

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {MODALITY: None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {MODALITY: seq_len}


class DummyPassages(BaseDummyInputsBuilder[PassageInfo]):
    """The largest possible request, for vLLM's memory profiling: all rows are slots, and an encoder pass is full."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return MARK * mm_counts.get(MODALITY, 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        count = mm_counts.get(MODALITY, 0)
        slots = max(1, seq_len // max(count, 1))
        lengths = torch.full((slots,), max(1, ENCODER_ROWS // (slots * max(count, 1))), dtype=torch.int64, device="cpu")
        ids = torch.zeros(int(lengths.sum()), dtype=torch.int64, device="cpu")
        windows, wanted = torch.arange(slots, device="cpu"), torch.ones(slots, dtype=torch.uint8, device="cpu")
        passage = ReadPassage(
            [0] * slots, [True] * slots, ids, lengths, windows, wanted, torch.zeros(0, self.info.width, device="cpu")
        )
        return {MODALITY: [passage] * count}


class PassageProcessor(BaseMultiModalProcessor[PassageInfo]):
    """Replaces each mark with its passage's rows."""

    def __init__(self, info: PassageInfo, dummy_inputs: DummyPassages) -> None:
        super().__init__(info, dummy_inputs)
        _ = info.store  # raise the store's errors now rather than at the first request

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        # Selecting chunks takes all passages into account, so it happens before vLLM caches passages one by one. The
        # items contain the selection from here on. Drop the options, which aren't needed anymore, and the caller's
        # uuids, which don't identify the selection.
        items = inputs.mm_data_items.get(MODALITY)
        if not items:
            return super().apply(inputs, timing_ctx)
        read = list(items)
        if not all(isinstance(item, ReadPassage) for item in read):
            info = self.info
            options = info.options(inputs.hf_processor_mm_kwargs)
            read = read_passages(read, info.processor, info.width, options, info.store, info.embedder)
        prompt, kept = self._spliced(inputs.prompt, read)
        if not kept:
            return tokens_input(prompt)
        settled = dataclasses.replace(
            inputs,
            prompt=prompt,
            mm_data_items=MultiModalDataItems({MODALITY: PassageItems(kept)}),
            mm_uuid_items=None,
            hf_processor_mm_kwargs={},
        )
        return super().apply(settled, timing_ctx)

    def _spliced(self, prompt: list[int], passages: list[ReadPassage]) -> tuple[list[int], list[ReadPassage]]:
        """Insert the tokens of passages without slots into the prompt; return the prompt and the other passages.

        Like ``RefragProcessor``, puts the start token before a slot that would come first.
        """
        mark = self._mark
        if prompt.count(mark) != len(passages):
            raise ValueError(
                f"prompt: got {prompt.count(mark)} marks {MARK} for {len(passages)} passages, needs one for each"
            )
        processor = self.info.processor
        start = processor.tokenizer.bos_token_id if processor.start_token else None
        lone_slot = prompt[:1] == [mark] and passages[0].is_slot[0]
        spliced: list[int] = [start] if lone_slot and start is not None else []
        waiting = iter(passages)
        for token in prompt:
            passage = next(waiting) if token == mark else None
            spliced += [token] if passage is None or any(passage.is_slot) else passage.token_ids
        return spliced, [passage for passage in passages if any(passage.is_slot)]

    @property
    def _mark(self) -> int:
        return self.info.get_tokenizer().convert_tokens_to_ids(MARK)

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        # ProcessorBatchItems uses the plural of the modality as the key.
        passages = hf_data[f"{MODALITY}s"]
        return BatchFeature({field: [getattr(passage, field) for passage in passages] for field in _FIELDS})

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {field: MultiModalFieldConfig.batched(MODALITY) for field in _FIELDS}

    def _get_prompt_updates(
        self, mm_items: MultiModalDataItems, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> list[PromptReplacement]:
        passages = list(mm_items.get(MODALITY, ()))  # empty if vLLM's cache has all of them

        def rows(index: int) -> PromptUpdateDetails:
            passage = passages[index]
            return PromptUpdateDetails(
                passage.token_ids, functools.partial(_slots, torch.tensor(passage.is_slot, device="cpu"))
            )

        return [PromptReplacement(modality=MODALITY, target=[self._mark], replacement=rows)]


def _slots(is_slot: torch.Tensor, full: list[int]) -> torch.Tensor:
    return is_slot
