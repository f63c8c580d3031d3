"""The demo: answers one question from the full text of retrieved passages and from compressed chunks."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from refrag import weights
from refrag.demo.corpus import python_reference
from refrag.demo.timing import Continuation, CpuPressure, Reading, continue_greedily, time_readings
from refrag.loading import load_model, load_processor
from refrag.model import attention
from refrag.model.inputs import MixedPrompt, Passage
from refrag.model.modeling import RefragForCausalLM
from refrag.processing.processor import Part, RefragProcessor
from refrag.processing.selectors import CosineSelector
from refrag.retrieval.retriever import Progress, Retriever

INSTRUCTION = "Answer the question with the help of this documentation.\n\n"

# The ways to read a prompt, in the table's order.
FULL, OWN_FULL, CACHED, ENCODED = "full", "own_full", "cached", "encoded"
READINGS = {
    FULL: "full text, HF SDPA",
    OWN_FULL: "full text, our attention",
    CACHED: "compressed, cached",
    ENCODED: "compressed, with encoding",
}


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """The options of the demo; see ``refrag demo --help``.

    Raises
    ------
    ValueError
        If a value is out of range. The message names the option.
    """

    question: str
    k: int = 8
    expand: float = 0.0
    context_tokens: int = 4096
    passages: int | None = None
    max_new_tokens: int = 48
    plot_tokens: tuple[int, ...] = ()
    rounds: int = 3

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise ValueError("--question: is empty, needs text")
        if not 0 <= self.expand <= 1:
            raise ValueError(f"--expand: got {self.expand}, needs a fraction from 0 to 1")
        for option in ("k", "passages", "max_new_tokens", "rounds"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ValueError(f"--{option.replace('_', '-')}: got {value}, needs 1 or more")


@dataclasses.dataclass(frozen=True)
class Models:
    """The models of the demo.

    Attributes
    ----------
    plain : PreTrainedModel
        Hugging Face's decoder.
    refrag : RefragForCausalLM
        REFRAG with the same decoder weights, and a trained adapter if there is one for k.
    processor : RefragProcessor
        The processor of ``refrag``.
    retriever, retriever_tokenizer
        MiniLM, which retrieves the passages.
    """

    plain: PreTrainedModel
    refrag: RefragForCausalLM
    processor: RefragProcessor
    retriever: PreTrainedModel
    retriever_tokenizer: PreTrainedTokenizerBase

    @staticmethod
    def load(k: int) -> Models:
        """Load the demo's weights. Without an adapter for k, the projector is random, with a fixed seed."""
        decoder, encoder = weights.decoder_folder(), weights.encoder_folder()
        refrag, processor = load_model(None, k), load_processor(None, k)
        with weights.quiet_transformers():
            plain = AutoModelForCausalLM.from_pretrained(decoder, attn_implementation="sdpa", local_files_only=True)
            retriever = refrag.encoder
            if weights.adapter_file(k):
                retriever = AutoModel.from_pretrained(
                    encoder, attn_implementation=attention.NAME, local_files_only=True
                ).eval()
            tokenizer = AutoTokenizer.from_pretrained(encoder, local_files_only=True)
            return Models(plain.eval(), refrag, processor, retriever, tokenizer)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The decoder's tokenizer."""
        return self.processor.tokenizer

    @property
    def window(self) -> int:
        """Maximum number of rows that the decoder can read."""
        return self.plain.config.max_position_embeddings


@dataclasses.dataclass(frozen=True)
class Answered:
    """The result for one context: the passages, the timings and the answers."""

    passages: list[str]
    readings: dict[str, Reading]
    continuations: dict[str, Continuation]
    compressed: MixedPrompt
    cpu_pressure: float | None


class Demo:
    """Builds prompts over the corpus and measures them.

    Parameters
    ----------
    settings : DemoSettings
    models : Models
    track : callable
        Shows progress while the corpus is encoded, on the first run.
    """

    def __init__(self, settings: DemoSettings, models: Models, track: Progress = iter) -> None:
        self.settings = settings
        self.models = models
        self.processor = models.processor
        # No window: prompts() itself checks the length of the full text, so that its message can name the option.
        self.unbounded = RefragProcessor(models.tokenizer, models.processor.encoder_tokenizer, settings.k)
        self.retriever = Retriever(models.retriever, models.retriever_tokenizer, python_reference(), track)
        self.ranked = [passage for passage, _ in self.retriever.rank(settings.question)]
        self.frame = self._parts([])
        self.frame_tokens = self._count(self.frame)

    def answer(self, track: Progress = iter) -> Answered:
        """Read the prompt in every way, and generate after each."""
        settings = self.settings
        parts, full, compressed = self.prompts(
            settings.context_tokens, settings.max_new_tokens, "--context-tokens", settings.passages
        )
        readings = self._readings(full, compressed)
        pressure = CpuPressure()
        outputs = time_readings(readings, settings.rounds, track)
        end = self._end_tokens()
        continuations = {
            name: continue_greedily(
                self.models.plain if name == FULL else self.models.refrag.decoder,
                output,
                end,
                settings.max_new_tokens if name in (FULL, CACHED) else 1,
            )
            for name, output in outputs.items()
        }
        ids = [part.id or "" for part in parts if isinstance(part, Passage)]
        return Answered(ids, readings, continuations, compressed, pressure.share())

    def check_plot(self) -> None:
        """Check that the plot's contexts fit, before work that takes minutes."""
        for tokens in self.settings.plot_tokens:
            self.prompts(tokens, 0, "--plot-tokens")

    def time_context(self, tokens: int) -> dict[str, Reading]:
        """Time the readings at one context length, for the plot."""
        _, full, compressed = self.prompts(tokens, 0, "--plot-tokens")
        readings = self._readings(full, compressed)
        del readings[OWN_FULL]
        # The longest contexts take half a minute per round, so they get fewer rounds; the figures list all of them.
        time_readings(readings, min(self.settings.rounds, 3 if tokens < 4096 else 2 if tokens < 8192 else 1))
        return readings

    def warm_up(self) -> None:
        """Read a short prompt in every way, so that the timings don't include one-time work of the first call."""
        _, full, compressed = self.prompts(self.frame_tokens + 64, 0, "--context-tokens")
        time_readings(self._readings(full, compressed), 1)

    def prompts(
        self, tokens: int, max_new_tokens: int, option: str, most_passages: int | None = None
    ) -> tuple[list[Part], MixedPrompt, MixedPrompt]:
        """Return the parts of a prompt of up to ``tokens`` tokens, and the prompt in full and compressed.

        Raises
        ------
        ValueError
            If ``tokens`` leaves no room for passages or exceeds the decoder's window. The message names ``option``.
        """
        if tokens <= self.frame_tokens:
            raise ValueError(
                f"{option}: got {tokens}, needs more than {self.frame_tokens}, the length of the question and the "
                "instruction"
            )
        parts = self._parts(self._fill(tokens - self.frame_tokens, most_passages))
        selector = CosineSelector(self.retriever.embed) if 0 < self.settings.expand < 1 else None
        compressed = self.processor(
            parts, expand=self.settings.expand, selector=selector, question=self.settings.question,
            max_new_tokens=max_new_tokens,
        )  # fmt: skip
        full = self.unbounded(parts, expand=1.0)
        over = full.layout.total_rows + max_new_tokens - self.models.window
        if over > 0:
            what = f"the full text and {max_new_tokens} new tokens are" if max_new_tokens else "the full text is"
            raise ValueError(
                f"{option}: {what} {over} over the decoder's window of {self.models.window}; "
                f"compressed with k = {self.settings.k} it would fit, but the demo reads both"
            )
        return parts, full, compressed

    def _parts(self, passages: Sequence[Passage]) -> list[Part]:
        content: list[Part] = [INSTRUCTION, *passages, f"\nQuestion: {self.settings.question.strip()}"]
        return self.processor.apply_chat_template([{"role": "user", "content": content}])

    def _count(self, parts: Sequence[Part]) -> int:
        return self.unbounded(parts, expand=1.0).layout.total_rows

    def _fill(self, tokens: int, most_passages: int | None) -> list[Passage]:
        """Return the best passages with at most ``tokens`` tokens in total, cutting the last one."""
        chosen: list[Passage] = []
        for passage in self.ranked[:most_passages]:
            text = passage.text.rstrip() + "\n\n"
            encoding = self.models.tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True, verbose=False
            )
            count = len(encoding["input_ids"])
            if count > tokens:
                text = text[: encoding["offset_mapping"][tokens][0]]
                count = tokens
            if text.strip():
                chosen.append(Passage(text, passage.id))
            tokens -= count
            if tokens <= 0:
                break
        return chosen

    def _readings(self, full: MixedPrompt, compressed: MixedPrompt) -> dict[str, Reading]:
        plain, refrag = self.models.plain, self.models.refrag
        with torch.inference_mode():
            chunk_embeds = refrag.encode_chunks(compressed.encoder_input)
        last: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1}
        calls: dict[str, Callable[[], Any]] = {
            FULL: lambda: plain(input_ids=full.token_ids[None], **last),
            OWN_FULL: lambda: refrag(prompt=full, **last),
            CACHED: lambda: refrag(prompt=compressed, chunk_embeds=chunk_embeds, **last),
            ENCODED: lambda: refrag(prompt=compressed, **last),
        }
        rows = {FULL: full, OWN_FULL: full, CACHED: compressed, ENCODED: compressed}
        return {name: Reading(rows[name].layout.total_rows, call) for name, call in calls.items()}

    def _end_tokens(self) -> set[int]:
        end = self.models.plain.generation_config.eos_token_id
        return set(end) if isinstance(end, list) else {end}


def figures(settings: DemoSettings, answered: Answered, plotted: dict[int, dict[str, Reading]]) -> dict[str, Any]:
    """Return all measurements as JSON values; times are in seconds."""

    def measured(readings: dict[str, Reading]) -> dict[str, Any]:
        full = readings[FULL].first_token
        return {
            name: {
                "rows": reading.rows,
                "seconds_to_first_token": reading.seconds,
                "speed_up": full / reading.first_token,
            }
            for name, reading in readings.items()
        }

    table = measured(answered.readings)
    for name, continuation in answered.continuations.items():
        table[name]["seconds_per_token"] = continuation.seconds_per_token
        table[name]["kv_cache_bytes"] = continuation.kv_bytes
    return {
        "settings": dataclasses.asdict(settings),
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "dtype": "float32",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "attention": attention.NAME,
        "passages": answered.passages,
        "cpu_pressure": answered.cpu_pressure,
        "chunks": len(answered.compressed.chunks),
        "chunks_expanded": len(answered.compressed.expanded),
        "table": table,
        "plot": {str(tokens): measured(readings) for tokens, readings in plotted.items()},
    }


def write_figures(path: Path, content: dict[str, Any]) -> None:
    """Write figures as JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
