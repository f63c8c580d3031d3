"""The stages of the recipe, each from its settings to a trained adapter."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import refrag_kernels as rk
from refrag.adapters import Trained, load_adapter, merge_state, prepare, save_adapter, trained_state
from refrag.encoder import pack_texts
from refrag.model import RefragForCausalLM
from refrag.policy import ExpansionPolicy
from refrag.processor import RefragProcessor
from refrag.token_encoder import token_encoder
from refrag.training.documents import Documents, prefix_ids
from refrag.training.measures import next_paragraph_loss, reconstruction_accuracy, target_loss
from refrag.training.samples import (
    Sample,
    Sampler,
    answer_sampler,
    collate,
    next_paragraph_sampler,
    reconstruction_sampler,
)
from refrag.training.schedules import constant_schedule, curriculum_schedule
from refrag.training.trainer import Trainer, TrainSettings


@dataclasses.dataclass
class Parts:
    """A model and the tokenizers that go with it."""

    model: RefragForCausalLM
    tokenizer: PreTrainedTokenizerBase
    encoder_tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(
        cls,
        encoder: str | os.PathLike[str] | None,
        decoder: str | os.PathLike[str],
        k: int,
        preset: str,
        **fields: Any,
    ) -> Parts:
        """Load pretrained parts and join them by a new projector, started by ``start_projector``.

        With the preset "tokens" there is no encoder to load: it is made by ``token_encoder``.
        """
        reader = AutoModelForCausalLM.from_pretrained(decoder)
        tokenizer = encoder_tokenizer = AutoTokenizer.from_pretrained(decoder)
        if preset == "tokens":
            if encoder is not None:
                raise ValueError(f"encoder: got {encoder}, needs None: preset tokens reads by the decoder's embeddings")
            writer = token_encoder(reader)
        else:
            if encoder is None:
                raise ValueError(f"encoder: got None, needs a folder or name with preset {preset}")
            writer, encoder_tokenizer = AutoModel.from_pretrained(encoder), AutoTokenizer.from_pretrained(encoder)
        model = RefragForCausalLM.from_parts(writer, reader, k, preset=preset, **fields)
        start_projector(model)
        return cls(model, tokenizer, encoder_tokenizer)

    @classmethod
    def load_trained(
        cls,
        adapter: str | os.PathLike[str],
        decoder: str | os.PathLike[str],
        *,
        encoder: str | os.PathLike[str] | None = None,
    ) -> tuple[Parts, ExpansionPolicy | None]:
        """Load the model of an adapter, with the encoder and decoder that it was trained on, and its policy."""
        reader = AutoModelForCausalLM.from_pretrained(decoder)
        tokenizer = encoder_tokenizer = AutoTokenizer.from_pretrained(decoder)
        writer = None
        if encoder is not None:
            writer, encoder_tokenizer = AutoModel.from_pretrained(encoder), AutoTokenizer.from_pretrained(encoder)
        model, policy = load_adapter(adapter, reader, writer)
        return cls(model, tokenizer, encoder_tokenizer), policy

    @property
    def k(self) -> int:
        """Decoder tokens of a chunk."""
        return self.model.config.chunk_size

    def collate(self, samples: Sequence[Sample]):
        """Pack samples for the model."""
        config = self.model.config
        return collate(
            samples,
            self.encoder_tokenizer,
            position_ids=config.position_ids,
            special_tokens=config.encoder_special_tokens,
            latents=config.latents,
            encoder_window=config.window,
        )

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the chunk embeddings of texts, as choosers want them: [N, d_enc]."""
        special = self.model.config.encoder_special_tokens
        return self.model.encode_chunks(pack_texts(self.encoder_tokenizer, texts, special_tokens=special))

    def signature(self) -> dict[str, Any]:
        """Say what a checkpoint of these parts belongs to."""
        decoder, encoder = self.model.decoder.config, self.model.encoder.config
        # Not where a chunk has one slot: checkpoints of before there were others stay valid.
        latents = self.model.config.latents
        return {
            **({"latents": latents} if latents > 1 else {}),
            "k": self.k,
            "pooling": self.model.config.pooling,
            "decoder": [decoder.model_type, decoder.hidden_size, decoder.num_hidden_layers],
            "encoder": [encoder.model_type, encoder.hidden_size, encoder.num_hidden_layers],
        }


@torch.no_grad()
def start_projector(model: RefragForCausalLM) -> None:
    """Start the projector where slots can be read.

    Slots get the size of token embeddings: torch's own start would drown them or let them drown all else. With pooling
    "concat" each run of a chunk gets dimensions of its own, by a random projection, so that their order is not mixed.
    """
    up, down = model.projector.up, model.projector.down
    width = up.out_features
    generator = torch.Generator().manual_seed(0)
    if model.config.pooling == "concat" and width >= model.config.pool_segments:
        segments, own = model.config.pool_segments, up.in_features // model.config.pool_segments
        share = width // segments
        up.weight.mul_(0.02)
        for segment in range(segments):
            rows, columns = slice(segment * share, (segment + 1) * share), slice(segment * own, (segment + 1) * own)
            block = torch.randn(max(share, own), min(share, own), generator=generator)
            block = torch.linalg.qr(block)[0].to(up.weight)
            up.weight[rows, columns] += block if share >= own else block.T * (own / share) ** 0.5
        same = torch.eye(width, dtype=down.weight.dtype)
        down.weight.mul_(0.02).add_(same.repeat(model.config.latents, 1))
    for layer in (up, down):
        if layer.bias is not None:
            layer.bias.zero_()
    table = model.get_input_embeddings().weight
    size = float(table[:: max(1, len(table) // 1000)].float().pow(2).mean().sqrt())
    chunks = torch.randn(256, up.in_features, generator=generator).to(table)
    slots = rk.project_chunks(
        model.projector.norm(chunks), *model.projector.weights(), activation=model.projector.activation
    )
    down.weight.mul_(size / float(slots.float().pow(2).mean().sqrt()))


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a training stage reads and how it learns.

    Attributes
    ----------
    objective : {"reconstruction", "next_paragraph", "answers"}
    trained : Trained
    settings : TrainSettings
    max_chunks : int
        The longest context, in chunks.
    curriculum : bool
        Whether lengths come in the paper's order (table 8), or shuffled: its ablation.
    output_tokens : int
        o, what is written after the context, for "next_paragraph".
    expand : float
        p, the share of chunks that stand as text, for "next_paragraph" and "answers".
    fixed_length : bool
        Whether all samples have ``max_chunks`` chunks.
    """

    objective: str
    trained: Trained
    settings: TrainSettings
    max_chunks: int = 256
    curriculum: bool = True
    output_tokens: int = 128
    expand: float = 0.0
    fixed_length: bool = False

    def __post_init__(self) -> None:
        if self.objective not in ("reconstruction", "next_paragraph", "answers"):
            raise ValueError(f"objective: got {self.objective!r}, needs reconstruction, next_paragraph or answers")


def run_stage(
    parts: Parts,
    stage: Stage,
    documents: Documents,
    held_out: Documents,
    folder: str | os.PathLike[str],
    *,
    start: str | os.PathLike[str] | None = None,
    accelerator: Accelerator | None = None,
) -> list[dict[str, Any]]:
    """Train one stage and write its adapter into ``folder``.

    Parameters
    ----------
    parts : Parts
    stage : Stage
    documents, held_out : Documents
        To train on, and to measure on; disjoint.
    folder : path
        Gets the log, checkpoints and ``adapter.safetensors``.
    start : path, optional
        Folder of an earlier stage's result, to go on from.
    accelerator : Accelerator, optional

    Returns
    -------
    list of dict
        The log.
    """
    prepare(parts.model, stage.trained)
    if start is not None:
        load_trained(parts.model, start)
    settings = stage.settings
    schedule = constant_schedule(stage.max_chunks)
    if not stage.fixed_length:
        schedule = curriculum_schedule(
            settings.steps * settings.batch_size, stage.max_chunks, seed=settings.seed, ordered=stage.curriculum
        )
    prefix = prefix_ids(parts.tokenizer)
    windows_of = functools.cache(documents.windows)
    windows_of(stage.max_chunks * parts.k + (stage.output_tokens if stage.objective == "next_paragraph" else 0))
    evaluate: Callable[[RefragForCausalLM], dict[str, Any]]
    if stage.objective == "reconstruction":
        sampler = reconstruction_sampler(windows_of, schedule, parts.k, parts.tokenizer, prefix, seed=settings.seed)
        evaluate = functools.partial(reconstruction_accuracy, parts=parts, documents=held_out)
    else:
        sampler = next_paragraph_sampler(
            windows_of, schedule, parts.k, parts.tokenizer, prefix,
            seed=settings.seed, output_tokens=stage.output_tokens, expand=stage.expand,
        )  # fmt: skip
        evaluate = functools.partial(
            next_paragraph_loss, parts=parts, documents=held_out,
            chunks=stage.max_chunks, output_tokens=stage.output_tokens,
        )  # fmt: skip
    return _train(parts, stage, sampler, evaluate, folder, accelerator)


def run_fine_tuning(
    parts: Parts,
    stage: Stage,
    questions: Sequence[Mapping[str, Any]],
    held_out: Sequence[Mapping[str, Any]],
    folder: str | os.PathLike[str],
    *,
    start: str | os.PathLike[str] | None = None,
    accelerator: Accelerator | None = None,
) -> list[dict[str, Any]]:
    """Fine-tune on questions, as ``run_stage`` trains on documents.

    Parameters
    ----------
    questions, held_out : sequence of dicts
        As ``answer_sampler`` takes them.
    """
    prepare(parts.model, stage.trained)
    if start is not None:
        load_trained(parts.model, start)
    processor = RefragProcessor.from_config(parts.model.config, parts.tokenizer, parts.encoder_tokenizer)
    sampler = answer_sampler(questions, processor, seed=stage.settings.seed, expand=stage.expand)
    measured = answer_sampler(held_out, processor, seed=0) if held_out else None
    evaluate = None
    if measured is not None:
        drawn = [measured(index) for index in range(len(held_out))]
        evaluate = functools.partial(target_loss, parts=parts, samples=drawn)
    return _train(parts, stage, sampler, evaluate, folder, accelerator)


def _train(
    parts: Parts,
    stage: Stage,
    sampler: Sampler,
    evaluate: Callable[[RefragForCausalLM], dict[str, Any]] | None,
    folder: str | os.PathLike[str],
    accelerator: Accelerator | None,
) -> list[dict[str, Any]]:
    latents = parts.model.config.latents

    def counted(index: int) -> Sample:  # how many rows it has decides how samples are put together
        return dataclasses.replace(sampler(index), latents=latents)

    trainer = Trainer(
        parts.model, counted, parts.collate, stage.settings, folder,
        evaluate=evaluate,
        signature={**parts.signature(), "objective": stage.objective, "trained": dataclasses.asdict(stage.trained)},
        accelerator=accelerator,
    )  # fmt: skip
    log = trainer.train()
    trained = trained_state(parts.model)  # in every process: each may hold a share
    if trainer.accelerator.is_main_process:
        save_adapter(parts.model, folder, trained)
        (Path(folder) / "stage.json").write_text(json.dumps(dataclasses.asdict(stage), indent=1) + "\n")
    return log


@torch.no_grad()
def load_trained(model: RefragForCausalLM, folder: str | os.PathLike[str]) -> None:
    """Go on from an earlier stage: its adapters where the model has the same, merged into the weights where it hasn't.

    Raises
    ------
    FileNotFoundError
        If the folder holds no adapter.
    """
    from safetensors.torch import load_file

    tensors = load_file(Path(folder) / "adapter.safetensors")
    own = trained_state(model)
    for name in [name for name in tensors if name in own]:
        own[name].copy_(tensors.pop(name))
    merge_state(model, {name: value for name, value in tensors.items() if not name.startswith("policy.")})
