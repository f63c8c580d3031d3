"""Runs a stage of the training recipe, from its options to a trained adapter."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from refrag.adapters import merge_state, prepare, save_adapter, trained_state
from refrag.bundle import ModelBundle
from refrag.data.documents import Documents, prefix_ids
from refrag.model.modeling import RefragForCausalLM
from refrag.processing.processor import RefragProcessor
from refrag.training.measures import next_paragraph_loss, reconstruction_accuracy, target_loss
from refrag.training.options import FinetuneOptions, PretrainOptions, ReconstructOptions, StageOptions, TextOptions
from refrag.training.samples import (
    Sample,
    Sampler,
    answer_sampler,
    collate_for,
    next_paragraph_sampler,
    reconstruction_sampler,
)
from refrag.training.schedules import constant_schedule, curriculum_schedule, shuffled_schedule
from refrag.training.trainer import Trainer

Evaluate = Callable[[RefragForCausalLM], dict[str, Any]]


def run_stage(
    parts: ModelBundle, options: StageOptions, documents: Any, held_out: Any, *, accelerator: Accelerator | None = None
) -> list[dict[str, Any]]:
    """Train one stage and write its adapter into ``options.output``.

    Parameters
    ----------
    parts : ModelBundle
    options : ReconstructOptions, PretrainOptions or FinetuneOptions
    documents, held_out : Documents, or for FinetuneOptions sequences of dicts
        Training and evaluation data, disjoint. For questions, see ``answer_sampler``.
    accelerator : Accelerator, optional
        By default one with the options' precision.

    Returns
    -------
    list of dict
        The log.
    """
    accelerator = accelerator or Accelerator(mixed_precision=options.precision)
    prepare(parts.model, options)
    if options.start is not None:
        load_trained(parts.model, options.start)
    sampler, evaluate = _SAMPLES[options.objective](parts, options, documents, held_out)
    latents = parts.model.config.latents
    # A checkpoint's signature has the parts' names as keys.
    trained = {"encoder": options.train_encoder, "decoder": options.train_decoder, "rank": options.rank}

    def counted(index: int) -> Sample:  # the number of rows, which determines the batches, depends on latents
        return dataclasses.replace(sampler(index), latents=latents)

    trainer = Trainer(
        parts.model, counted, functools.partial(collate_for, parts), options, options.output,
        evaluate=evaluate,
        signature={**parts.signature(), "objective": options.objective, "trained": trained},
        accelerator=accelerator,
    )  # fmt: skip
    log = trainer.train()
    state = trained_state(parts.model)  # in every process, since parameters may be sharded
    if accelerator.is_main_process:
        save_adapter(parts.model, options.output, state)
    return log


def _reconstruction(
    parts: ModelBundle, options: ReconstructOptions, documents: Documents, held_out: Documents
) -> tuple[Sampler, Evaluate]:
    windows_of = functools.cache(documents.windows)
    windows_of(options.max_chunks * parts.k)  # raises if all documents are too short
    sampler = reconstruction_sampler(
        windows_of, _schedule(options), parts.k, parts.tokenizer, prefix_ids(parts.tokenizer), seed=options.seed
    )
    return sampler, functools.partial(reconstruction_accuracy, parts=parts, documents=held_out)


def _next_paragraph(
    parts: ModelBundle, options: PretrainOptions, documents: Documents, held_out: Documents
) -> tuple[Sampler, Evaluate]:
    windows_of = functools.cache(documents.windows)
    windows_of(options.max_chunks * parts.k + options.output_tokens)
    sampler = next_paragraph_sampler(
        windows_of, _schedule(options), parts.k, parts.tokenizer, prefix_ids(parts.tokenizer),
        seed=options.seed, output_tokens=options.output_tokens, expand=options.expand,
    )  # fmt: skip
    evaluate = functools.partial(
        next_paragraph_loss, parts=parts, documents=held_out,
        max_chunks=options.max_chunks, output_tokens=options.output_tokens,
    )  # fmt: skip
    return sampler, evaluate


def _answers(
    parts: ModelBundle,
    options: FinetuneOptions,
    documents: Sequence[Mapping[str, Any]],
    held_out: Sequence[Mapping[str, Any]],
) -> tuple[Sampler, Evaluate | None]:
    processor = RefragProcessor.from_config(parts.model.config, parts.tokenizer, parts.encoder_tokenizer)
    sampler = answer_sampler(documents, processor, seed=options.seed, expand=options.expand)
    if not held_out:
        return sampler, None
    measured = answer_sampler(held_out, processor, seed=0)
    samples = [measured(index) for index in range(len(held_out))]
    return sampler, functools.partial(target_loss, parts=parts, samples=samples)


# For each objective, a function that returns the training samples and the evaluation.
_SAMPLES: dict[str, Callable[..., tuple[Sampler, Evaluate | None]]] = {
    ReconstructOptions.objective: _reconstruction,
    PretrainOptions.objective: _next_paragraph,
    FinetuneOptions.objective: _answers,
}


def _schedule(options: TextOptions) -> Callable[[int], int]:
    if options.fixed_length:
        return constant_schedule(options.max_chunks)
    schedule = curriculum_schedule if options.curriculum else shuffled_schedule
    return schedule(options.steps * options.batch_size, options.max_chunks, seed=options.seed)


@torch.no_grad()
def load_trained(model: RefragForCausalLM, start: str | os.PathLike[str]) -> None:
    """Load an earlier stage: into the parameters that this stage trains as well, or else merged into the weights.

    Raises
    ------
    FileNotFoundError
        If the folder contains no adapter.
    """
    from safetensors.torch import load_file

    tensors = load_file(Path(start) / "adapter.safetensors")
    own = trained_state(model)
    for name in [name for name in tensors if name in own]:
        own[name].copy_(tensors.pop(name))
    merge_state(model, {name: value for name, value in tensors.items() if not name.startswith("policy.")})
