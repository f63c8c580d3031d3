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

from refrag.adapters import TrainableSpec, merge_state, prepare, save_adapter, trained_state
from refrag.bundle import ModelBundle
from refrag.data.documents import Documents, prefix_ids
from refrag.model.modeling import RefragForCausalLM
from refrag.processing.processor import RefragProcessor
from refrag.training.measures import next_paragraph_loss, reconstruction_accuracy, target_loss
from refrag.training.samples import (
    Sample,
    Sampler,
    answer_sampler,
    collate_for,
    next_paragraph_sampler,
    reconstruction_sampler,
)
from refrag.training.schedules import constant_schedule, curriculum_schedule
from refrag.training.trainer import Trainer, TrainSettings


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a training stage reads and how it learns.

    Attributes
    ----------
    objective : {"reconstruction", "next_paragraph", "answers"}
    trained : TrainableSpec
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
    trained: TrainableSpec
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
    parts: ModelBundle,
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
    parts : ModelBundle
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
    parts: ModelBundle,
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
    parts: ModelBundle,
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
        parts.model, counted, functools.partial(collate_for, parts), stage.settings, folder,
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
