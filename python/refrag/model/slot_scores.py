"""How much attention the text of a prompt pays to the slots of each chunk."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from refrag.model.inputs import MixedPrompt
from refrag.model.slot_prefill import entries_of_prompt, require_window, run, slot_prefill
from refrag.model.slot_sequence import sequences_of


def chunk_attention(model: Any, prompt: MixedPrompt) -> tuple[torch.Tensor, MixedPrompt]:
    """Return the attention that each chunk receives from the text after it, summed over rows, heads and layers.

    Only the text goes through the decoder.

    Parameters
    ----------
    model : RefragForCausalLM
    prompt : MixedPrompt
        With key/value slots.

    Returns
    -------
    Tensor [N], float32
        On the CPU.
    MixedPrompt
        The prompt with the entries of its passages. Passages that were read here have all rows.

    Raises
    ------
    ValueError
        As ``model.generate``, or if a chunk's attention isn't finite.
    """
    sequences = sequences_of(prompt)
    require_window(model, prompt)
    entries = entries_of_prompt(model, prompt, sequences, full=True)
    prefill = slot_prefill(model, sequences, entries)
    received: list[torch.Tensor] = []
    run(model, prefill, prefill.cache(), received)
    of_row = torch.stack([layer.sum(1) for layer in received]).sum(0).cpu()
    scores: list[torch.Tensor] = []
    first = 0
    for sequence in sequences:
        for passage in sequence.passages:
            rows = of_row[first : first + passage.rows]
            scores += [part.sum() for part in rows.split(list(passage.keep))]
            first += passage.rows
        first += sum(len(text.token_ids) for text in sequence.texts)
    prompt = dataclasses.replace(prompt, passages=tuple(entry for own in entries for entry in own))
    result = torch.stack(scores) if scores else torch.zeros(0, device="cpu")
    bad = (~result.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"scores: got NaN or inf for chunk {bad[0]}, needs finite numbers: the decoder overflows")
    return result, prompt
