"""The options of `refrag train` and `refrag eval`, from the command line or a file to where they are used."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

from refrag.training.arguments import Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopOptions(Options):
    """How to train; the defaults are the paper's (B.3) where it has any.

    Attributes
    ----------
    steps : int
        Optimizer steps.
    batch_size : int
        Samples of a step, over all processes.
    learning_rate : float
        The peak of the learning rate.
    projector_rate, encoder_rate : float, optional
        Peak of this part alone; the learning rate of the others when it isn't given.
    warmup : float
        Share of the steps in which the rate rises; then it falls as a cosine to 0.
    betas : tuple of 2 floats
        AdamW's.
    weight_decay : float
        AdamW's.
    max_grad_norm : float
        Norm to which all gradients together are clipped.
    max_rows : int
        Decoder rows of one forward pass: bounds the memory. A step's samples are cut into as many passes as this needs.
    checkpoint_every : int
        Steps between checkpoints.
    log_every : int
        Steps between entries of the log.
    evaluate_every : int
        Steps between measurements on held-out text.
    seed : int
        Of the samples, their order and dropout.
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
        self.require("warmup", lambda value: 0 <= value <= 1, "0 to 1")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: got {self.betas}, needs two numbers from 0 up to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Which model to train, what of it, and where the result goes.

    Attributes
    ----------
    output : Path
        Folder for the log, checkpoints and the adapter.
    encoder, decoder : str, optional
        Folder or hub name; the demo's model when it isn't given.
    k : int
        Tokens of a chunk.
    preset : str
        paper, lclm or tokens: see RefragConfig.
    pooling : str, optional
        first, mean, last or concat; the preset's when it isn't given.
    latents : int
        Slots of a compressed chunk.
    start : Path, optional
        Output folder of an earlier stage to start from.
    train_encoder, train_decoder : {"all", "lora", "none"}
        What to train of this part: all, lora or none.
    rank : int
        Rank of the low-rank adapters.
    held_out : float
        Share of the documents to measure on.
    precision : {"bf16", "no", "fp16", "fp8"}
        Mixed precision, as Accelerate knows it: bf16, no (the weights' own), fp16 or fp8.
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


# Fields come in the order of the method resolution backwards: those of ModelOptions before those of LoopOptions.
@dataclasses.dataclass(frozen=True, kw_only=True)
class StageOptions(LoopOptions, ModelOptions):
    """Options of every stage that trains the model."""

    objective: ClassVar[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions(StageOptions):
    """Options of the stages that train on documents.

    Attributes
    ----------
    data : tuple of str
        Folder of text files, .jsonl or .parquet file, or dataset of the hub (name or name:split); may be repeated.
    max_chunks : int
        Chunks of the longest samples.
    curriculum : bool
        Short samples first, by the paper's table 8; or the same, shuffled.
    fixed_length : bool
        All samples as long as the longest, instead of the curriculum's lengths.
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
    """Stage 1: write a text again from its chunks."""

    objective: ClassVar[str] = "reconstruction"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainOptions(TextOptions):
    """Stage 2: write what follows the chunks.

    Attributes
    ----------
    output_tokens : int
        o, the tokens written after the context.
    expand : float
        p, the share of the chunks that stay text, drawn at random.
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
        .jsonl file: question, passages (a list) and answer on each line.
    expand : float
        p, the share of the chunks that stay text, drawn at random.
    held_out : float
        Share of the questions to measure on: the last ones.
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
    """How to train the policy; the paper gives none of these numbers.

    Attributes
    ----------
    steps : int
        Steps, each of ``contexts`` contexts.
    contexts : int
        B, the contexts of a step.
    rollouts : int
        G, the expansions drawn for each context.
    expand : float
        p, the share of the chunks to expand.
    epsilon : float
        By how much the clip lets a pick's probability ratio differ from 1.
    updates : int
        Optimizer steps on each step's rollouts.
    learning_rate : float
        AdamW's, constant.
    max_grad_norm : float
        Norm to which all gradients together are clipped.
    seed : int
        Of the contexts, the rollouts and the policy's first weights.
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
        self.require("rollouts", lambda value: value >= 2, "2 or more: each is compared with its group")
        self.require("expand", lambda value: 0 < value < 1, "more than 0 and less than 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterOptions(Options):
    """A trained model, and where the result goes.

    Attributes
    ----------
    adapter : Path
        Output folder of the stage that trained the model, or distilled.
    output : Path
        Folder for the result.
    encoder, decoder : str, optional
        Folder or hub name; what the adapter was trained on when it isn't given.
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
        Folder of text files, .jsonl or .parquet file, or dataset of the hub (name or name:split); may be repeated.
    chunks : int
        Chunks of a context.
    output_tokens : int
        o, the tokens whose likelihood is the reward.
    width, num_heads : int
        Of the policy's two layers.
    checkpoint_every : int
        Steps between checkpoints.
    held_out : float
        Share of the documents to leave out: what the earlier stages measured on.
    precision : {"bf16", "no"}
        Of the passes that score rollouts: bf16, or no (the weights' own). The policy itself is float32.
    """

    data: tuple[str, ...]
    chunks: int = 32
    output_tokens: int = 64
    width: int = 128
    num_heads: int = 4
    checkpoint_every: int = 20
    held_out: float = 0.05
    precision: Literal["bf16", "no"] = "bf16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditions(Options):
    """What the table of perplexities compares.

    Attributes
    ----------
    context : int
        s, the tokens of a context: a multiple of k.
    output_tokens : int
        o, the tokens that follow it.
    rates : tuple of float
        Compression rates at which selectors expand, k / (1 - p + k p), separated by commas; at most k.
    selectors : tuple of str
        Selectors of a given number of chunks, separated by commas; policy is added where the adapter holds one.
    """

    context: int = 256
    output_tokens: int = 64
    rates: tuple[float, ...] = (4.0, 8.0)
    selectors: tuple[str, ...] = dataclasses.field(
        default=("random", "perplexity-desc", "perplexity-asc", "cosine"), metadata={"formerly": "choosers"}
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerplexityOptions(Conditions, AdapterOptions):
    """Options of ``refrag eval perplexity``.

    Attributes
    ----------
    data : tuple of str
        Domain to measure on, name=source: a source as refrag train takes it; may be repeated.
    samples : int
        Contexts of each domain.
    held_out : float
        Share of the documents, by content: that of training for a domain it saw, or 1.
    untrained : bool
        Measure the decoder as it was before training, too.
    precision : {"bf16", "no"}
        bf16, or no: the weights' own.
    seed : int
        Of the contexts, and of the selector random.
    """

    data: tuple[str, ...]
    rates: tuple[float, ...] = (4.0,)
    samples: int = 128
    held_out: float = 1.0
    untrained: bool = True
    precision: Literal["bf16", "no"] = "no"
    seed: int = 0
