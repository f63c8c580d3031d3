"""The job of `refrag encode`: encodes slices of a corpus into a store, in this process or on Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from refrag import weights
from refrag.data.sources import Fields, Slice
from refrag.encoding.kv_encoder import KVEncoder
from refrag.encoding.passage_encoder import PassageEncoder
from refrag.encoding.store_filler import AnyStore, StoreFiller
from refrag.loading import (
    DEFAULT_K,
    is_adapter,
    load_kv_model,
    load_kv_processor,
    load_model,
    load_processor,
    load_trained,
    with_kv_slots,
)
from refrag.model import attention
from refrag.model.config import RefragConfig
from refrag.model.feed_forward import fuse_feed_forward
from refrag.model.inference_linear import use_inference_linears
from refrag.model.inputs import Passage
from refrag.model.modeling import RefragForCausalLM
from refrag.model.passage_rows import SlotRule
from refrag.processing.processor import RefragProcessor
from refrag.store.fingerprint import Fingerprint, KVFingerprint
from refrag.store.kv_store import KV_DTYPES, KVStore
from refrag.store.store import DTYPES, ChunkStore

AnyModel = TypeVar("AnyModel", bound=PreTrainedModel)


class Step(NamedTuple):
    """A completed part of the job: its ``PutCounts``, and an error message for each record that was skipped."""

    new: int
    known: int
    moved_ids: int
    left_out: list[str]


@dataclasses.dataclass(frozen=True)
class EncodeJob:
    """Settings of `refrag encode`, which can be sent to another process.

    Attributes
    ----------
    store : Path
    model : Path or None
        Folder that a training stage wrote, or one that RefragForCausalLM.save_pretrained and
        RefragProcessor.save_pretrained wrote. Defaults to the demo's model if ``encoder``, ``decoder`` and ``preset``
        are None, too.
    encoder, decoder : str or None
        Without ``model``: arguments of from_pretrained; only the decoder's tokenizer is loaded. With a training stage:
        replacements for its base models if their original paths no longer exist.
    k : int or None
    chunker : str or None
    preset : str or None
    encoder_dtype : str
        The ``dtype`` of from_pretrained.
    dtype : str or None
        Dtype of the store's rows. Defaults to that of an existing store, or float32.
    fields : Fields
    batch_tokens, shard_passages : int
    device : str
    skip_bad : bool
        Skip invalid records instead of stopping at the first one.
    kv_slots : SlotRule or None
        For a store of keys and values. Defaults to that of a saved ``model``; without, the store is one of embeddings.
    full_rows : bool
        With ``kv_slots``: store all rows as well.
    """

    store: Path
    model: Path | None = None
    encoder: str | None = None
    decoder: str | None = None
    k: int | None = None
    chunker: str | None = None
    preset: str | None = None
    encoder_dtype: str = "auto"
    dtype: str | None = None
    fields: Fields = Fields()
    batch_tokens: int = 8192
    shard_passages: int = 4096
    device: str = "cpu"
    skip_bad: bool = False
    kv_slots: SlotRule | None = None
    full_rows: bool = False

    def __post_init__(self) -> None:
        # A worker in another directory would resolve a relative path to another store.
        object.__setattr__(self, "store", self.store.absolute())
        if self.kv_slots is None and self.model is not None and (self.model / "config.json").is_file():
            object.__setattr__(self, "kv_slots", RefragConfig.from_pretrained(self.model).kv_slots)
        for name in ("k", "batch_tokens", "shard_passages"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')}: got {value}, needs 1 or more")
        choices = {
            "chunker": ("fixed", "sentence"), "preset": ("paper", "lclm"),
            "dtype": tuple(KV_DTYPES if self.kv_slots else DTYPES), "encoder_dtype": ("auto", *DTYPES),
        }  # fmt: skip
        if self.kv_slots is None and self.full_rows:
            raise ValueError("--full-rows: needs --slots kv, too")
        if self.kv_slots is not None and self.preset is not None:
            raise ValueError(f"--preset: got {self.preset} with --slots kv, which has no embeddings")
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ValueError(f"--{name.replace('_', '-')}: got {value!r}, needs one of {', '.join(allowed)}")
        if self.model is not None:
            stage = is_adapter(self.model)
            for name in ("k", "preset") if stage else ("encoder", "decoder", "k", "chunker", "preset"):
                if getattr(self, name) is not None:
                    raise ValueError(f"--{name}: got {getattr(self, name)} with --model, which determines it")
            for name in () if stage else ("config.json", "refrag_processor.json"):
                if not (self.model / name).is_file():
                    raise ValueError(
                        f"--model: {self.model} has no {name}, needs a folder that RefragForCausalLM.save_pretrained "
                        "and RefragProcessor.save_pretrained wrote, a training stage's folder, or 'distilled'"
                    )

    def passage_encoder(self) -> PassageEncoder | KVEncoder:
        """Load what encodes passages.

        For embeddings, these are the encoder and the tokenizers, and the decoder's weights only if the encoder is built
        from them; for keys and values, the whole model.
        """
        if self.kv_slots is not None:
            return self._kv_encoder(self.kv_slots)
        with weights.quiet_transformers():
            if self.model is not None and is_adapter(self.model):
                model, processor, _ = load_trained(
                    self.model, chunker=self.chunker or "fixed", encoder=self.encoder, decoder=self.decoder
                )
                config, encoder = model.config, self._placed(model.encoder)
            elif self.model is not None:
                config = RefragConfig.from_pretrained(self.model)
                processor = RefragProcessor.from_pretrained(self.model)
                # Loads only the encoder's weights from the model's checkpoint.
                encoder = self._load(self.model, config=config.encoder_config, key_mapping={r"^encoder\.": ""})
            elif self._is_demo() and weights.adapter_file(self.k or DEFAULT_K):
                model = load_model(None, self.k)
                processor = load_processor(None, self.k, self.chunker or "fixed")
                config, encoder = model.config, self._placed(model.encoder)
            else:
                config, processor, encoder = self._from_parts()
        return PassageEncoder(encoder, processor, config, batch_tokens=self.batch_tokens)

    def _kv_encoder(self, rule: SlotRule) -> KVEncoder:
        with weights.quiet_transformers():
            if self.model is not None and is_adapter(self.model):
                model, processor, _ = load_trained(
                    self.model, chunker=self.chunker or "fixed", encoder=self.encoder, decoder=self.decoder
                )
                model.config.use_kv_slots(rule)
                processor = with_kv_slots(processor, rule)
            elif self.model is None and (self.encoder or self.decoder):
                sources = self.decoder or weights.decoder_folder(), self.encoder or weights.encoder_folder()
                decoder, encoder = (
                    kind.from_pretrained(source) for kind, source in zip((AutoModelForCausalLM, AutoModel), sources)
                )
                model = RefragForCausalLM.from_parts(encoder, decoder, self.k or 16, preset="kv").eval()
                model.config.use_kv_slots(rule)
                tokenizers = (_tokenizer(source) for source in sources)
                processor = RefragProcessor.from_config(model.config, *tokenizers, chunker=self.chunker or "fixed")
            else:
                model = load_kv_model(self.model, self.k, rule)
                chunker = RefragProcessor.from_pretrained(self.model).chunker_name if self.model else self.chunker
                processor = load_kv_processor(self.model, self.k, rule, chunker or "fixed")
        model = self._placed(model)
        return KVEncoder(model, processor, full=self.full_rows, batch_tokens=self.batch_tokens)

    def _is_demo(self) -> bool:
        return self.model is None and self.encoder is None and self.decoder is None and self.preset is None

    def _from_parts(self) -> tuple[RefragConfig, RefragProcessor, PreTrainedModel]:
        encoder = self._load(self.encoder or weights.encoder_folder())
        decoder = self.decoder or weights.decoder_folder()
        # The default encoder, MiniLM, was trained with mean pooling.
        preset = self.preset or ("paper" if self.encoder else "lclm")
        config = RefragConfig.from_preset(
            preset, AutoConfig.from_pretrained(decoder), encoder.config,
            chunk_size=self.k or (DEFAULT_K if self._is_demo() else 16),
        )  # fmt: skip
        tokenizers = _tokenizer(decoder), _tokenizer(self.encoder or weights.encoder_folder())
        processor = RefragProcessor.from_config(config, *tokenizers, chunker=self.chunker or "fixed")
        return config, processor, encoder

    def _load(self, source: str | Path, **options: object) -> PreTrainedModel:
        encoder = AutoModel.from_pretrained(
            source, dtype=self.encoder_dtype, attn_implementation=attention.NAME, **options
        )
        fuse_feed_forward(encoder)
        use_inference_linears(encoder)
        return self._placed(encoder)

    def _placed(self, encoder: AnyModel) -> AnyModel:
        """Return a model in eval mode, on the job's device and in its dtype."""
        dtype = None if self.encoder_dtype == "auto" else DTYPES[self.encoder_dtype]
        try:
            return encoder.eval().to(device=self.device, dtype=dtype or encoder.dtype)
        except (RuntimeError, AssertionError) as error:  # from torch, for an unavailable device
            raise ValueError(f"--device: got {self.device}: {str(error).splitlines()[0]}") from error

    def open_store(self, fingerprint: Fingerprint | KVFingerprint) -> ChunkStore | KVStore:
        """Open the store, or create it.

        Raises
        ------
        StoreError
            If the store exists and has another fingerprint.
        ValueError
            If the store exists and has another dtype than the job, or lacks its full rows.
        """
        new = not (self.store / "store.json").exists()
        if isinstance(fingerprint, KVFingerprint):
            if new:
                dtype = KV_DTYPES[self.dtype or "bfloat16"]
                return KVStore.create(self.store, fingerprint, dtype, full=self.full_rows)
            held = KVStore.open(self.store, fingerprint)
            if self.full_rows != held.full:
                raise ValueError(f"--full-rows: got {self.full_rows}, but the store {self.store} has {held.full}")
            return self._with_dtype(held, KV_DTYPES)
        if new:
            return ChunkStore.create(self.store, fingerprint, DTYPES[self.dtype or "float32"])
        return self._with_dtype(ChunkStore.open(self.store, fingerprint), DTYPES)

    def _with_dtype(self, store: AnyStore, dtypes: dict[str, torch.dtype]) -> AnyStore:
        if self.dtype is not None and store.dtype != dtypes[self.dtype]:
            raise ValueError(f"--dtype: got {self.dtype}, but the store {self.store} holds {_name(store.dtype)}")
        return store

    def steps(self, encoder: StoreFiller[AnyStore], store: AnyStore, slices: Iterable[Slice]) -> Iterator[Step]:
        """Encode slices, a shard at a time, and yield each step once its shard is on disk.

        Raises
        ------
        PassageError
            At the first invalid record, unless ``skip_bad`` is set; complete shards before it are kept.
        """
        left_out: list[str] = []
        passages = self._passages(slices, left_out)
        for counts in encoder.fill_steps(store, passages, shard_passages=self.shard_passages):
            yield Step(*counts, left_out[:])
            left_out.clear()
        if left_out:
            yield Step(0, 0, 0, left_out)

    def _passages(self, slices: Iterable[Slice], left_out: list[str]) -> Iterator[Passage]:
        for part in slices:
            for record in part.read(self.fields):
                if isinstance(record, Passage):
                    yield record
                elif self.skip_bad:
                    left_out.append(str(record))
                else:
                    raise record


def run_here(job: EncodeJob, slices: Sequence[Slice]) -> Iterator[Step]:
    """Run the job in this process."""
    encoder: Any = job.passage_encoder()  # of the kind that fills the job's store
    yield from job.steps(encoder, job.open_store(encoder.fingerprint), slices)


def _tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(source)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
