"""The options of `refrag train` and `refrag eval`: dataclasses, passed from the command line to the training loops."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from refrag.training.arguments import Options


def are_betas(betas: Sequence[float]) -> bool:
    """Return whether these are AdamW's two betas."""
    return len(betas) == 2 and all(0 <= beta < 1 for beta in betas)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopOptions(Options):
    """Options of the training loop. The defaults are the paper's (B.3) if it states them.

    Attributes
    ----------
    steps : int
        Optimizer steps.
    batch_size : int
        Samples per step, over all processes.
    learning_rate : float
        Peak learning rate.
    projector_rate, encoder_rate : float, optional
        Peak learning rate of this part, if it differs from the learning rate.
    warmup : float
        Fraction of the steps for linear warm-up; the rate then falls to 0 as a cosine.
    betas : tuple of 2 floats
        AdamW's betas.
    weight_decay : float
        AdamW's weight decay.
    max_grad_norm : float
        Norm to which all gradients together are clipped.
    max_rows : int
        Maximum decoder rows of a forward pass, which limits memory. A step takes as many passes as its samples need.
    checkpoint_every : int
        Steps between checkpoints.
    log_every : int
        Steps between log entries.
    evaluate_every : int
        Steps between evaluations on held-out text.
    seed : int
        Seed of the samples, their order and dropout.
    """

    steps: int = 1000
    batch_size: int = 256
    learning_rate: float = 2e-4
    projector_rate: float | None = None
    encoder_rate: float | None = None
    warmup: float = 0.04
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_rows: int = 4096
    checkpoint_every: int = 100
    log_every: int = 10
    evaluate_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = "steps batch_size max_rows checkpoint_every log_every evaluate_every"
        self.require(counts, lambda value: value >= 1, "1 or more")
        rates = "learning_rate projector_rate encoder_rate max_grad_norm"
        self.require(rates, lambda value: value > 0, "more than 0")
        self.require("weight_decay", lambda value: value >= 0, "0 or more")
        self.require("warmup", lambda value: 0 <= value <= 1, "0 to 1")
        self.require("betas", are_betas, "two numbers from 0 up to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Which model and which parts of it to train, and where to write the result.

    Attributes
    ----------
    output : Path
        Folder for the log, checkpoints and the adapter.
    encoder, decoder : str, optional
        Folder or hub name; the demo's model by default.
    k : int
        Tokens per chunk.
    preset : str
        paper, lclm or tokens: see RefragConfig.
    pooling : str, optional
        first, mean, last or concat; the preset's by default.
    latents : int
        Slots per compressed chunk.
    start : Path, optional
        Output folder of an earlier stage to start from.
    train_encoder, train_decoder : {"all", "lora", "none"}
        Which parameters of this part to train: all, low-rank adapters (lora) or none.
    rank : int
        Rank of the low-rank adapters.
    held_out : float
        Fraction of the documents that are held out for evaluation.
    precision : {"bf16", "no", "fp16", "fp8"}
        Accelerate's mixed precision: bf16, no (the weights' own dtype), fp16 or fp8.
    """

    output: Path
    encoder: str | None = None
    decoder: str | None = None
    k: int = 16
    preset: str = "paper"
    pooling: str | None = None
    latents: int = 1
    start: Path | None = None
    train_encoder: Literal["all", "lora", "none"] = "all"
    train_decoder: Literal["all", "lora", "none"] = "none"
    rank: int = 32
    held_out: float = 0.05
    precision: Literal["bf16", "no", "fp16", "fp8"] = "bf16"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("k latents rank", lambda value: value >= 1, "1 or more")
        self.require("held_out", lambda value: 0 <= value < 1, "0 up to 1")


# Dataclasses collect fields in reverse MRO: ModelOptions' come before LoopOptions'.
@dataclasses.dataclass(frozen=True, kw_only=True)
class StageOptions(LoopOptions, ModelOptions):
    """Options common to all stages that train the model."""

    objective: ClassVar[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions(StageOptions):
    """Options of the stages that train on documents.

    Attributes
    ----------
    data : tuple of str
        Folder of text files, .jsonl or .parquet file, or hub dataset (name or name:split); may be repeated.
    max_chunks : int
        Number of chunks in the longest samples.
    curriculum : bool
        Order samples from short to long as in the paper's table 8, instead of shuffling the same lengths.
    fixed_length : bool
        Make all samples as long as the longest, instead of using the curriculum's lengths.
    """

    data: tuple[str, ...]
    max_chunks: int = 256
    curriculum: bool = True
    fixed_length: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("max_chunks", lambda value: value >= 1, "1 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReconstructOptions(TextOptions):
    """Stage 1: reconstruct a text from its chunks."""

    objective: ClassVar[str] = "reconstruction"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainOptions(TextOptions):
    """Stage 2: continue the text after its chunks.

    Attributes
    ----------
    output_tokens : int
        o, the number of tokens to write after the context.
    expand : float
        p, the fraction of chunks that stay text, drawn at random.
    """

    objective: ClassVar[str] = "next_paragraph"
    train_decoder: Literal["all", "lora", "none"] = "all"
    learning_rate: float = 5e-5
    output_tokens: int = 2048
    expand: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("output_tokens", lambda value: value >= 1, "1 or more")
        self.require("expand", lambda value: 0 <= value <= 1, "0 to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneOptions(StageOptions):
    """Stage 3: answer questions over passages.

    Attributes
    ----------
    data : Path
        .jsonl file with question, passages (a list) and answer on each line.
    expand : float
        p, the fraction of chunks that stay text, drawn at random.
    held_out : float
        Fraction of the questions that are held out for evaluation: the last ones.
    """

    objective: ClassVar[str] = "answers"
    data: Path
    train_decoder: Literal["all", "lora", "none"] = "all"
    learning_rate: float = 2e-5
    expand: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("expand", lambda value: 0 <= value <= 1, "0 to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutOptions(Options):
    """Options of the policy's training. The paper doesn't state any of these numbers.

    Attributes
    ----------
    steps : int
        Number of steps, each over ``contexts`` contexts.
    contexts : int
        B, the number of contexts per step.
    rollouts : int
        G, the number of expansions drawn for each context.
    expand : float
        p, the fraction of chunks to expand.
    epsilon : float
        How far a pick's probability ratio may differ from 1 before it is clipped.
    updates : int
        Optimizer steps on the rollouts of each step.
    learning_rate : float
        AdamW's learning rate, constant.
    max_grad_norm : float
        Norm to which all gradients together are clipped.
    seed : int
        Seed of the contexts, the rollouts and the policy's initial weights.
    """

    steps: int = 200
    contexts: int = 8
    rollouts: int = 8
    expand: float = 0.1
    epsilon: float = 0.2
    updates: int = 2
    learning_rate: float = 3e-4
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("steps contexts updates", lambda value: value >= 1, "1 or more")
        self.require("epsilon learning_rate max_grad_norm", lambda value: value > 0, "more than 0")
        self.require("rollouts", lambda value: value >= 2, "2 or more: each is compared with its group")
        self.require("expand", lambda value: 0 < value < 1, "more than 0 and less than 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterOptions(Options):
    """Which trained model to use, and where to write the result.

    Attributes
    ----------
    adapter : Path
        Output folder of the stage that trained the model, or `distilled`.
    output : Path
        Folder for the result.
    encoder, decoder : str, optional
        Folder or hub name; by default the one that the adapter was trained on.
    """

    adapter: Path
    output: Path
    encoder: str | None = None
    decoder: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyOptions(RolloutOptions, AdapterOptions):
    """Stage 4: train a policy that chooses the chunks to expand.

    Attributes
    ----------
    data : tuple of str
        Folder of text files, .jsonl or .parquet file, or hub dataset (name or name:split); may be repeated.
    chunks : int
        Chunks per context.
    output_tokens : int
        o, the number of tokens whose likelihood is the reward.
    width, num_heads : int
        Hidden size and attention heads of the policy's two layers.
    checkpoint_every : int
        Steps between checkpoints.
    held_out : float
        Fraction of the documents to omit: those that the earlier stages held out.
    precision : {"bf16", "no"}
        Precision of the passes that score rollouts: bf16, or no (the weights' own dtype). The policy is float32.
    """

    data: tuple[str, ...]
    chunks: int = 32
    output_tokens: int = 64
    width: int = 128
    num_heads: int = 4
    checkpoint_every: int = 20
    held_out: float = 0.05
    precision: Literal["bf16", "no"] = "bf16"

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = "chunks output_tokens width num_heads checkpoint_every"
        self.require(counts, lambda value: value >= 1, "1 or more")
        self.require("held_out", lambda value: 0 <= value < 1, "0 up to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditions(Options):
    """The conditions that the table of perplexities compares.

    Attributes
    ----------
    context : int
        s, the number of tokens in a context: a multiple of k.
    output_tokens : int
        o, the number of tokens after the context.
    rates : tuple of float
        Compression rates k / (1 - p + k p) at which the selectors expand chunks, separated by commas; at most k.
    selectors : tuple of str
        Selectors to compare, separated by commas; policy is added if the adapter has one.
    """

    context: int = 256
    output_tokens: int = 64
    rates: tuple[float, ...] = (4.0, 8.0)
    selectors: tuple[str, ...] = dataclasses.field(
        default=("random", "perplexity-desc", "perplexity-asc", "cosine"), metadata={"formerly": "choosers"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("context output_tokens", lambda value: value >= 1, "1 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerplexityOptions(Conditions, AdapterOptions):
    """Options of ``refrag eval perplexity``.

    Attributes
    ----------
    data : tuple of str
        Domain to measure, as name=source, with the same sources as for refrag train; may be repeated.
    samples : int
        Contexts per domain.
    held_out : float
        Fraction of the documents to measure: training's held_out for a domain that was trained on, else 1.
    untrained : bool
        Also measure the decoder as it was before training.
    precision : {"bf16", "no"}
        bf16, or no (the weights' own dtype).
    seed : int
        Seed of the contexts and of the selector random.
    """

    data: tuple[str, ...]
    rates: tuple[float, ...] = (4.0,)
    samples: int = 128
    held_out: float = 1.0
    untrained: bool = True
    precision: Literal["bf16", "no"] = "no"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("samples", lambda value: value >= 1, "1 or more")
        self.require("held_out", lambda value: 0 < value <= 1, "more than 0, up to 1")
