"""`refrag train`: the stages of the training recipe, one command each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from refrag.commands.option_commands import option_command
from refrag.console import say
from refrag.training.options import (
    FinetuneOptions,
    PolicyOptions,
    PretrainOptions,
    ReconstructOptions,
    StageOptions,
    TextOptions,
)

if TYPE_CHECKING:
    from refrag.bundle import ModelBundle

train = typer.Typer(no_args_is_help=True, help="Train the projector, encoder, decoder or policy, as the paper does.")


@train.command()
@option_command(ReconstructOptions)
def reconstruct(options: ReconstructOptions, console: Console) -> None:
    """Stage 1: train the model to reconstruct a text from its chunks (REFRAG, 3.1).

    An interrupted run resumes from its last checkpoint when it is started again with the same options.
    """
    _train(options, console)


@train.command()
@option_command(PretrainOptions)
def pretrain(options: PretrainOptions, console: Console) -> None:
    """Stage 2: train the model to continue the text after its chunks (REFRAG, 3.1); ``--expand 0.1`` mixes text in."""
    _train(options, console)


@train.command()
@option_command(FinetuneOptions)
def finetune(options: FinetuneOptions, console: Console) -> None:
    """Stage 3: train the model to answer questions from passages (REFRAG, 3.1)."""
    _train(options, console)


@train.command()
@option_command(PolicyOptions)
def policy(options: PolicyOptions, console: Console) -> None:
    """Stage 4: train a policy that chooses the chunks to expand, by reinforcement learning (REFRAG, A.1)."""
    from refrag.data.documents import read_documents, split_documents
    from refrag.training.policy_stage import run_policy_stage

    parts, _ = load_trained_parts(console, options.adapter, options.encoder, options.decoder)
    documents, _ = split_documents(read_documents(options.data, parts.tokenizer), options.held_out)
    run_policy_stage(parts, options, documents)
    say_written(console, options.output)


def _train(options: StageOptions, console: Console) -> None:
    from refrag.bundle import ModelBundle
    from refrag.data.documents import read_documents, split_documents
    from refrag.training.stages import run_stage
    from refrag.training.trainer import TrainingError

    say(console, "loading encoder and decoder")
    encoder, decoder = folders(options.encoder, options.decoder, options.preset)
    fields = {} if options.pooling is None else {"pooling": options.pooling}
    parts = ModelBundle.load(encoder, decoder, options.k, options.preset, latents=options.latents, **fields)
    texts: tuple[Any, Any]
    if isinstance(options, FinetuneOptions):
        questions = read_questions(options.data)
        cut = len(questions) - round(options.held_out * len(questions))
        texts = questions[:cut], questions[cut:]
    else:
        assert isinstance(options, TextOptions)
        texts = split_documents(read_documents(options.data, parts.tokenizer), options.held_out)
    try:
        run_stage(parts, options, *texts)
    except TrainingError as error:
        raise ValueError(str(error)) from None
    say_written(console, options.output)


def say_written(console: Console, output: Path) -> None:
    """Print the paths of the files that a training run has written."""
    console.print(f"Wrote {output}/adapter.safetensors and log.jsonl", highlight=False, soft_wrap=True)


def folders(encoder: str | None, decoder: str | None, preset: str) -> tuple[str | None, str]:
    """Return the encoder and decoder that the options name, by default the demo's; preset "tokens" has no encoder."""
    from refrag import weights

    if encoder is None and preset != "tokens":
        encoder = str(weights.encoder_folder())
    if decoder is None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        decoder = str(weights.decoder_folder())
    return encoder, decoder


def load_trained_parts(
    console: Console, adapter: Path, encoder: str | None, decoder: str | None
) -> tuple[ModelBundle, Any]:
    """Load an adapter and its policy, or None, on its own encoder and decoder unless others are named."""
    from refrag.bundle import ModelBundle
    from refrag.loading import trained_sources

    encoder, decoder = trained_sources(adapter, encoder, decoder)
    if Path(decoder).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    say(console, "loading encoder and decoder")
    return ModelBundle.load_trained(adapter, decoder, encoder=encoder)


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Read questions from a .jsonl or .jsonl.xz file.

    Raises
    ------
    ValueError
        If a line is not a JSON object, or the file is damaged or not UTF-8. The message names the file and line.
    """
    import json
    import lzma

    questions = []
    try:
        content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        text = content.decode("utf-8-sig")
    except lzma.LZMAError as error:
        raise ValueError(f"{path}: is damaged ({error})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 (byte {error.start})") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                questions.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                raise ValueError(f"{path}:{number}: got {line[:60]!r}, needs a JSON object") from None
    return questions
