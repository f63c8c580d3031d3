"""`refrag train`: the stages of the recipe, one command each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from refrag.console import clear_errors, say

if TYPE_CHECKING:
    from accelerate import Accelerator

    from refrag.bundle import ModelBundle

train = typer.Typer(no_args_is_help=True, help="Train the projector, encoder, decoder or policy, as the paper does.")

_DATA = "Folder of text files, .jsonl or .parquet file, or dataset of the hub (name or name:split); may be repeated."
_MODEL = "Folder or hub name; the demo's model when it isn't given."

Data = Annotated[list[str], typer.Option("--data", help=_DATA)]
Output = Annotated[Path, typer.Option("--output", help="Folder for the log, checkpoints and the adapter.")]
Encoder = Annotated[str | None, typer.Option(help=_MODEL)]
Decoder = Annotated[str | None, typer.Option(help=_MODEL)]
TrainedPart = Annotated[
    str | None, typer.Option(help="Folder or hub name; what the adapter was trained on when it isn't given.")
]
K = Annotated[int, typer.Option("--k", help="Tokens of a chunk.")]
Preset = Annotated[str, typer.Option(help="paper, lclm or tokens: see RefragConfig.")]
Pooling = Annotated[str | None, typer.Option(help="first, mean, last or concat; the preset's when it isn't given.")]
Latents = Annotated[int, typer.Option(help="Slots of a compressed chunk.")]
Start = Annotated[Path | None, typer.Option(help="Output folder of an earlier stage to go on from.")]
TrainEncoder = Annotated[str, typer.Option(help="What to train of the encoder: all, lora or none.")]
TrainDecoder = Annotated[str, typer.Option(help="What to train of the decoder: all, lora or none.")]
Rank = Annotated[int, typer.Option(help="Rank of the low-rank adapters.")]
Steps = Annotated[int, typer.Option(help="Optimizer steps.")]
Batch = Annotated[int, typer.Option("--batch-size", help="Samples of a step.")]
Rate = Annotated[float, typer.Option("--learning-rate", help="Its peak.")]
PartRate = Annotated[float | None, typer.Option(help="Peak of this part alone.")]
MaxChunks = Annotated[int, typer.Option(help="Chunks of the longest samples.")]
Curriculum = Annotated[bool, typer.Option(help="Short samples first, by the paper's table 8; or the same, shuffled.")]
HeldOut = Annotated[float, typer.Option(help="Share of the documents to measure on.")]
MaxRows = Annotated[int, typer.Option(help="Decoder rows of one forward pass: bounds the memory.")]
Precision = Annotated[str, typer.Option(help="bf16 or no.")]
Every = Annotated[int, typer.Option(help="Steps between checkpoints.")]
EvaluateEvery = Annotated[int, typer.Option(help="Steps between measurements on held-out text.")]
Seed = Annotated[int, typer.Option()]


@train.command()
def reconstruct(
    data: Data,
    output: Output,
    encoder: Encoder = None,
    decoder: Decoder = None,
    k: K = 16,
    preset: Preset = "paper",
    pooling: Pooling = None,
    latents: Latents = 1,
    start: Start = None,
    train_encoder: TrainEncoder = "all",
    train_decoder: TrainDecoder = "none",
    rank: Rank = 32,
    steps: Steps = 1000,
    batch_size: Batch = 256,
    learning_rate: Rate = 2e-4,
    projector_rate: PartRate = None,
    encoder_rate: PartRate = None,
    max_chunks: MaxChunks = 256,
    curriculum: Curriculum = True,
    held_out: HeldOut = 0.05,
    max_rows: MaxRows = 4096,
    precision: Precision = "bf16",
    checkpoint_every: Every = 100,
    evaluate_every: EvaluateEvery = 100,
    seed: Seed = 0,
) -> None:
    """Stage 1: make the decoder write a text again from its chunks (REFRAG, 3.1).

    A run that was broken off goes on from its last checkpoint when it is started again with the same options.
    """
    _run_stage("reconstruction", locals())


@train.command()
def pretrain(
    data: Data,
    output: Output,
    encoder: Encoder = None,
    decoder: Decoder = None,
    k: K = 16,
    preset: Preset = "paper",
    pooling: Pooling = None,
    latents: Latents = 1,
    start: Start = None,
    train_encoder: TrainEncoder = "all",
    train_decoder: TrainDecoder = "all",
    rank: Rank = 32,
    steps: Steps = 1000,
    batch_size: Batch = 256,
    learning_rate: Rate = 5e-5,
    projector_rate: PartRate = None,
    encoder_rate: PartRate = None,
    max_chunks: MaxChunks = 256,
    output_tokens: Annotated[int, typer.Option(help="o, the tokens written after the context.")] = 2048,
    expand: Annotated[float, typer.Option(help="Share of the chunks that stand as text, drawn at random.")] = 0.0,
    curriculum: Curriculum = True,
    held_out: HeldOut = 0.05,
    max_rows: MaxRows = 4096,
    precision: Precision = "bf16",
    checkpoint_every: Every = 100,
    evaluate_every: EvaluateEvery = 100,
    seed: Seed = 0,
) -> None:
    """Stage 2: make it write what follows the chunks (REFRAG, 3.1); with ``--expand 0.1``, from mixed input."""
    _run_stage("next_paragraph", locals())


@train.command()
def finetune(
    data: Annotated[Path, typer.Option(help=".jsonl file: question, passages (a list) and answer on each line.")],
    output: Output,
    encoder: Encoder = None,
    decoder: Decoder = None,
    k: K = 16,
    preset: Preset = "paper",
    pooling: Pooling = None,
    latents: Latents = 1,
    start: Start = None,
    train_encoder: TrainEncoder = "all",
    train_decoder: TrainDecoder = "all",
    rank: Rank = 32,
    steps: Steps = 1000,
    batch_size: Batch = 256,
    learning_rate: Rate = 2e-5,
    projector_rate: PartRate = None,
    encoder_rate: PartRate = None,
    expand: Annotated[float, typer.Option(help="Share of the chunks that stand as text, drawn at random.")] = 0.0,
    held_out: Annotated[float, typer.Option(help="Share of the questions to measure on: the last ones.")] = 0.05,
    max_rows: MaxRows = 4096,
    precision: Precision = "bf16",
    checkpoint_every: Every = 100,
    evaluate_every: EvaluateEvery = 100,
    seed: Seed = 0,
) -> None:
    """Stage 3: make it answer questions over passages (REFRAG, 3.1)."""
    _run_stage("answers", locals())


@train.command()
def policy(
    data: Data,
    adapter: Annotated[Path, typer.Option(help="Output folder of the stage that trained the model.")],
    output: Output,
    encoder: TrainedPart = None,
    decoder: TrainedPart = None,
    steps: Steps = 200,
    contexts: Annotated[int, typer.Option(help="Contexts of a step.")] = 8,
    rollouts: Annotated[int, typer.Option(help="G, expansions drawn for each.")] = 8,
    expand: Annotated[float, typer.Option(help="p, the share of the chunks to expand.")] = 0.1,
    chunks: Annotated[int, typer.Option(help="Chunks of a context.")] = 32,
    output_tokens: Annotated[int, typer.Option(help="o, the tokens whose likelihood is the reward.")] = 64,
    learning_rate: Rate = 3e-4,
    updates: Annotated[int, typer.Option(help="Optimizer steps on each step's rollouts.")] = 2,
    width: Annotated[int, typer.Option(help="Of the policy's two layers.")] = 128,
    held_out: HeldOut = 0.05,
    precision: Precision = "bf16",
    seed: Seed = 0,
) -> None:
    """Stage 4: make a policy choose the chunks to expand, by reinforcement learning (REFRAG, A.1)."""
    console = Console()
    with clear_errors(console):
        from refrag.data.documents import read_documents, split_documents
        from refrag.training.policy_gradient import PolicySettings
        from refrag.training.policy_stage import PolicyStage, run_policy_stage

        settings = PolicySettings(
            steps, contexts, rollouts, expand, updates=updates, learning_rate=learning_rate, seed=seed
        )
        parts, _ = load_trained_parts(console, adapter, encoder, decoder)
        documents, _ = split_documents(read_documents(data, parts.tokenizer), held_out)
        stage = PolicyStage(settings, chunks, output_tokens, width, precision=precision)
        run_policy_stage(parts, stage, documents, adapter, output)
        console.print(f"Wrote {output}/adapter.safetensors and log.jsonl", highlight=False, soft_wrap=True)


def _run_stage(objective: str, options: dict[str, Any]) -> None:
    console = Console()
    with clear_errors(console):
        from refrag.adapters import TrainableSpec
        from refrag.bundle import ModelBundle
        from refrag.data.documents import read_documents, split_documents
        from refrag.training.stages import Stage, run_fine_tuning, run_stage
        from refrag.training.trainer import TrainingError, TrainSettings

        named = ("steps", "batch_size", "learning_rate", "projector_rate", "encoder_rate", "max_rows",
                 "checkpoint_every", "evaluate_every", "seed")  # fmt: skip
        extra = {name: options[name] for name in ("output_tokens", "expand", "max_chunks", "curriculum")
                 if name in options}  # fmt: skip
        stage = Stage(
            objective,
            TrainableSpec(options["train_encoder"], options["train_decoder"], options["rank"]),
            TrainSettings(**{name: options[name] for name in named}),
            **extra,
        )
        say(console, "loading encoder and decoder")
        encoder, decoder = folders(options["encoder"], options["decoder"], options["preset"])
        fields = {"latents": options["latents"]}
        if options["pooling"] is not None:
            fields["pooling"] = options["pooling"]
        parts = ModelBundle.load(encoder, decoder, options["k"], options["preset"], **fields)
        common = {"start": options["start"], "accelerator": _accelerator(options["precision"])}
        try:
            if objective == "answers":
                questions = read_questions(options["data"])
                held = round(options["held_out"] * len(questions))
                cut = len(questions) - held
                run_fine_tuning(parts, stage, questions[:cut], questions[cut:], options["output"], **common)
            else:
                documents = read_documents(options["data"], parts.tokenizer)
                run_stage(parts, stage, *split_documents(documents, options["held_out"]), options["output"], **common)
        except TrainingError as error:
            raise ValueError(str(error)) from None
        console.print(f"Wrote {options['output']}/adapter.safetensors and log.jsonl", highlight=False, soft_wrap=True)


def folders(encoder: str | None, decoder: str | None, preset: str) -> tuple[str | None, str]:
    """Return the encoder and decoder that the options name, or the demo's; no encoder for the preset "tokens"."""
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
    """Load the model of an adapter, and its policy or None; its encoder and decoder unless others are named."""
    from refrag.bundle import ModelBundle
    from refrag.loading import trained_sources

    encoder, decoder = trained_sources(adapter, encoder, decoder)
    if Path(decoder).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    say(console, "loading encoder and decoder")
    return ModelBundle.load_trained(adapter, decoder, encoder=encoder)


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Read a .jsonl file of questions, or a .jsonl.xz file.

    Raises
    ------
    ValueError
        If a line is no JSON object, or the file is not UTF-8; names it.
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


def _accelerator(precision: str) -> Accelerator:
    from accelerate import Accelerator

    return Accelerator(mixed_precision=precision)
