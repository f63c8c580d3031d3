"""`refrag generate`: answer a question from passages, and stream the answer."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from refrag.commands import options
from refrag.console import clear_errors

if TYPE_CHECKING:
    import torch

    from refrag.model.inputs import MixedPrompt


def generate(
    question: options.Question,
    passages: options.Files = None,
    model: options.Model = None,
    k: options.K = None,
    chunker: options.Chunker = "fixed",
    selector: options.SelectorName = None,
    expand: options.Expand = None,
    threshold: options.Threshold = None,
    policy: options.Policy = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum tokens of the answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 means greedy decoding.")] = 0.0,
    seed: options.Seed = 0,
    encoder: options.Encoder = None,
    decoder: options.Decoder = None,
    store: options.Store = None,
    ids: options.Ids = None,
    slots: options.Slots = None,
    slot_rows: options.SlotRows = 1,
    slot_rule: options.SlotRuleName = "received",
    slot_whole: options.SlotWhole = 0,
) -> None:
    """Answer a question from passages; the decoder reads one embedding for each chunk that is not expanded.

    With --slots kv it reads rows of its own keys and values in their place.

    Streams the answer to standard output, and writes prompt sizes and times to standard error.
    """
    notes = Console(stderr=True)
    with clear_errors(notes):
        if max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens: got {max_new_tokens}, needs 1 or more")
        if temperature < 0:
            raise ValueError(f"--temperature: got {temperature}, needs 0 or more")
        chosen = options.PromptOptions(
            passages or [], question, model, k, chunker, selector, expand, threshold, policy, seed, encoder, decoder,
            store, ids, slots, slot_rows, slot_rule, slot_whole,
        )  # fmt: skip
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        with notes.status("loading"):
            import torch

            from refrag.demo.caution import KV_SLOTS, UNTRAINED, caution
            from refrag.demo.streaming import TimedStreamer

            processor, prompt = chosen.prompt(max_new_tokens)
            refrag = chosen.model()
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature}
            torch.manual_seed(seed)
        start = time.perf_counter()
        streamer = TimedStreamer(processor.tokenizer)
        tokens = refrag.generate(
            prompt, chunk_embeds=chosen.chunk_embeds(prompt), max_new_tokens=max_new_tokens, streamer=streamer,
            **sampling,
        )  # fmt: skip
        notes.print(_summary(prompt, tokens, streamer.times, start), style="dim", highlight=False, soft_wrap=True)
        warning = caution(model, processor.k) if processor.kv_slots is None else KV_SLOTS
        if warning is not None and len(prompt.expanded) < len(prompt.chunks):
            advice = " Use --k 8, a trained --model, or --selector everything." if warning == UNTRAINED else ""
            notes.print(warning + advice, style="yellow", highlight=False, soft_wrap=True)


def _summary(prompt: MixedPrompt, tokens: torch.Tensor, times: list[float], start: float) -> str:
    from refrag.demo.inspection import PromptCounts

    text = f"{PromptCounts.of(prompt)}; first token after {times[0] - start:.2f} s"
    if len(times) > 1:
        text += f", then {(len(times) - 1) / (times[-1] - times[0]):.1f} tokens a second"
    return text
