"""The options of ``refrag train distill``: one dataclass, from the command line to the loop."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from refrag.training.arguments import Options
from refrag.training.options import are_betas

# Domains that are held out of all training, by the names of their packages.
HELD_OUT_DOMAINS = ("debian-handbook", "postgresql-doc", "perl-doc", "git-doc", "git-man")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillOptions(Options):
    """Options of a distillation run. The defaults suit a seven-minute run on one H100.

    Attributes
    ----------
    tokens, heldout : tuple of Path
        Token files to train on, and to measure on, one domain per file.
    decoder : Path, optional
        Folder of the decoder; the demo's by default.
    output : Path
        Folder for ``adapter.safetensors``, ``log.jsonl`` and ``state.pt``.
    minutes : float, optional
        Time for the whole run, from loading to the final evaluation. Schedules follow the clock.
    steps : int, optional
        Number of steps; schedules follow the steps. Give either minutes or steps.
    start : Path, optional
        Adapter to start from, trained with the same ranks.
    k : int
        Tokens per chunk.
    encoder_layers, encoder_rank, decoder_rank : int
        Number of the decoder's first layers that form the encoder, and ranks of the low-rank updates.
    pooling : {"concat", "mean"}
        How the last hidden states of a chunk's tokens are pooled.
    contexts : tuple of int
        s, tokens per context: each step draws one of these.
    output_tokens : int
        o, tokens per continuation.
    step_tokens : int
        Tokens of all contexts and continuations of a step.
    expanded : float
        Fraction of the chunks that are left as text.
    reconstruction, first_reconstruction : float
        Fraction of the context tokens that are reconstructed rather than continued: from the end of the first third of
        the run on, and at its beginning.
    reconstruction_chunks : tuple of int
        Chunks per reconstruction: each step draws one of these.
    reconstruction_token : int
        Token that marks a reconstruction, as opposed to a continuation: one that has no other use.
    cross_entropy : float
        Weight of the cross-entropy relative to the KL divergence.
    linear_rate, encoder_rate, decoder_rate : float
        Peak learning rates.
    linear_alone, warmup, floor : float
        Share of the run in which only the linear layer is trained; share for warming a rate up; final rate as a share
        of the peak.
    betas : tuple of 2 floats
        AdamW's betas.
    max_grad_norm : float
        Norm to which all gradients together are clipped.
    log_every : int
        Steps between log entries.
    save_seconds, evaluate_seconds : float
        Seconds between saved adapters, and between evaluations.
    evaluate_samples, final_samples : int
        Samples per domain in evaluations during the run, and in the final one.
    reserve_seconds : float
        Time reserved for the final evaluation and the final adapter.
    pieces : Path, optional
        Folder for the adapter in pieces of at most ``piece_bytes`` bytes, and a copy of the log.
    piece_bytes : int
        Maximum size of a piece in bytes.
    keep_state : bool
        Whether to write the optimizer's state next to the adapter, so that a run can be resumed exactly.
    block_rows : int
        Number of rows whose logits are computed at once.
    attention : {"auto", "refrag", "torch", "faster"}
        refrag_kernels' or torch's own. "faster" compares them before the run, and uses torch's if it is faster or if
        they disagree; "auto" means "faster" on a GPU, and refrag_kernels' on a CPU.
    compile : bool
        Whether to compile the layers with torch.compile. Not needed: most of a step is matrix products.
    device, dtype : str
        Device to train on, and dtype of the frozen weights and the activations; "auto" is bfloat16 on a GPU.
    seed : int
        Seed of the samples and the low-rank updates.
    """

    tokens: tuple[Path, ...]
    heldout: tuple[Path, ...]
    output: Path
    decoder: Path | None = None
    minutes: float | None = None
    steps: int | None = None
    start: Path | None = None
    k: int = 8
    encoder_layers: int = 8
    encoder_rank: int = 48
    decoder_rank: int = 16
    pooling: Literal["concat", "mean"] = "concat"
    contexts: tuple[int, ...] = (128, 256, 512)
    output_tokens: int = 96
    step_tokens: int = 40960
    expanded: float = 0.15
    reconstruction: float = 0.15
    first_reconstruction: float = 0.5
    reconstruction_chunks: tuple[int, ...] = (1, 4, 16)
    reconstruction_token: int = 16
    cross_entropy: float = 0.2
    linear_rate: float = 1e-3
    encoder_rate: float = 1e-3
    decoder_rate: float = 7e-4
    linear_alone: float = 0.02
    warmup: float = 0.03
    floor: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    log_every: int = 50
    save_seconds: float = 60.0
    evaluate_seconds: float = 60.0
    evaluate_samples: int = 32
    final_samples: int = 128
    reserve_seconds: float = 20.0
    pieces: Path | None = None
    piece_bytes: int = 15 * 2**20
    keep_state: bool = True
    block_rows: int = 2048
    attention: Literal["auto", "refrag", "torch", "faster"] = "auto"
    compile: bool = False
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.minutes is None) == (self.steps is None):
            raise ValueError(f"minutes, steps: got {self.minutes} and {self.steps}, needs exactly one of the two")
        for name in ("tokens", "heldout", "contexts", "reconstruction_chunks"):
            if not getattr(self, name):
                raise ValueError(f"{name}: got none, needs one or more")
        counts = (
            "k encoder_layers encoder_rank decoder_rank output_tokens step_tokens log_every evaluate_samples "
            "final_samples piece_bytes block_rows"
        )
        self.require(counts, lambda value: value >= 1, "1 or more")
        rates = "minutes steps linear_rate encoder_rate decoder_rate max_grad_norm"
        self.require(rates, lambda value: value > 0, "more than 0")
        shares = "expanded reconstruction first_reconstruction linear_alone warmup floor"
        self.require(shares, lambda value: 0 <= value < 1, "0 up to 1")
        self.require("betas", are_betas, "two numbers from 0 up to 1")
        for context in self.contexts:
            if context < self.k or context % self.k:
                raise ValueError(f"contexts: got {context}, needs multiples of k = {self.k}")
        if min(self.reconstruction_chunks) < 1:
            raise ValueError(f"reconstruction_chunks: got {self.reconstruction_chunks}, needs numbers of 1 or more")
        both = {path.resolve() for path in self.tokens} & {path.resolve() for path in self.heldout}
        if both:
            raise ValueError(f"tokens: got {sorted(both)[0]}, which is also among the held-out files")

    @property
    def segments(self) -> int:
        """Number of segments of a chunk whose states "concat" keeps apart."""
        return self.k if self.pooling == "concat" else 1

    def signature(self) -> dict[str, Any]:
        """Return the options that must be equal to resume a run: those that shape the adapter and the samples."""
        own = dataclasses.asdict(self)
        kept = ("k", "encoder_layers", "encoder_rank", "decoder_rank", "pooling", "contexts", "output_tokens",
                "step_tokens", "expanded", "reconstruction_token", "steps", "seed")  # fmt: skip
        return {name: list(own[name]) if isinstance(own[name], tuple) else own[name] for name in kept}
