"""`refrag inspect`: draw a prompt as the decoder reads it."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from rich.console import Console

from refrag.commands import options
from refrag.console import clear_errors


def inspect(
    question: options.Question,
    passages: options.Files = None,
    model: options.Model = None,
    k: options.K = None,
    chunker: options.Chunker = "fixed",
    selector: options.SelectorName = None,
    expand: options.Expand = None,
    threshold: options.Threshold = None,
    policy: options.Policy = None,
    hidden: Annotated[bool, typer.Option("--hidden", help="Show the text of compressed chunks too.")] = False,
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
    """Draw a prompt: its text, a slot such as [3] for each compressed chunk, expanded chunks as [4: text], and counts.

    The output has no colours if NO_COLOR is set or standard output is not a terminal.
    """
    console = Console()
    with clear_errors(console):
        chosen = options.PromptOptions(
            passages or [], question, model, k, chunker, selector, expand, threshold, policy, seed, encoder, decoder,
            store, ids, slots, slot_rows, slot_rule, slot_whole,
        )  # fmt: skip
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        with Console(stderr=True).status("loading"):
            from refrag.demo.inspection import PromptCounts, draw

            processor, prompt = chosen.prompt()
        console.print(draw(prompt, processor.tokenizer, hidden=hidden), soft_wrap=True)
        console.print()
        console.print(str(PromptCounts.of(prompt)), highlight=False, soft_wrap=True)
        if prompt.kv_slots is not None:
            console.print(f"slots of keys and values: {prompt.kv_slots}", highlight=False, soft_wrap=True)
