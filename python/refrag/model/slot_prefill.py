"""Prefill of prompts with key/value slots: passages are put into the cache, and only text goes through the decoder.

The cache holds the rows of the passages before those of the text. Keys carry their positions, so the order in the cache
doesn't matter; a mask says which passages precede a text.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from refrag.model.attention import AttentionPlans, packed_pass
from refrag.model.generation import PackedPrefill
from refrag.model.inputs import MixedPrompt
from refrag.model.key_rotation import KeyRotation
from refrag.model.passage_reading import read_passages
from refrag.model.passage_rows import MissingRowsError, PassageEntry, SlotRule
from refrag.model.slot_sequence import PlacedPassage, SlotSequence, sequences_of
from refrag_kernels import ChunkLayout, ChunkMask


def entries_of(
    model: Any,
    sequence: SlotSequence,
    rule: SlotRule,
    entries: Sequence[PassageEntry] | None,
    shared: Sequence[int],
    *,
    full: bool = False,
) -> list[PassageEntry]:
    """Return the entries of a sequence's passages, and read those that are missing or lack rows to expand.

    Parameters
    ----------
    model : RefragForCausalLM
    sequence : SlotSequence
    rule : SlotRule
    entries : sequence of PassageEntry, optional
        Those that are known, of all passages.
    shared : sequence of int
        Tokens of the text that the passages are read behind.
    full : bool
        Whether to keep all rows of passages that are read here.

    Raises
    ------
    ValueError
        If the entries don't fit the passages, the text before them, or the decoder.
    """
    passages = sequence.passages
    if entries is not None and len(entries) != len(passages):
        raise ValueError(f"passages: got {len(entries)} entries, needs {len(passages)}, one for each passage")
    result: list[PassageEntry | None] = [None] * len(passages)
    for index, (passage, entry) in enumerate(zip(passages, entries or ())):
        if entry.slots.start != len(shared):
            raise ValueError(
                f"passages: entry {index} was read behind {entry.slots.start} tokens of shared text, got a prompt with "
                f"{len(shared)} before its passages"
            )
        shape = tuple(entry.slots.keys.shape[axis] for axis in (0, 1, 3))
        if shape != model.key_rotation.shape:
            raise ValueError(
                f"passages: entry {index} has {shape} layers, key/value heads and head_dim, needs the decoder's, "
                f"{model.key_rotation.shape}"
            )
        try:
            entry.require(passage.lengths, passage.keep)
            result[index] = entry
        except MissingRowsError:
            pass
    missing = [index for index, entry in enumerate(result) if entry is None]
    if missing:
        whole = [passages[index].keep != rule.keep(passages[index].lengths) for index in missing]
        chunks = [passages[index].chunks for index in missing]
        read = read_passages(model, model.key_rotation, chunks, shared, rule, full=full or any(whole))
        for index, entry in zip(missing, read):
            result[index] = entry
            entry.require(passages[index].lengths, passages[index].keep)
    return [entry for entry in result if entry is not None]


def placed_rows(
    rotation: KeyRotation,
    passages: Sequence[PlacedPassage],
    entries: Sequence[PassageEntry],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the keys and values [L, H, N, D] of passages, one after the other, at their places; None for none."""
    if not passages:
        return None
    taken = [entry.take(passage.keep).to(device, dtype) for passage, entry in zip(passages, entries, strict=True)]
    sizes = [sum(passage.lengths) for passage in passages]
    firsts = itertools.accumulate(sizes, initial=0)
    rows = torch.cat([part.rows + first for part, first in zip(taken, firsts)], dim=2)
    old, new = (
        torch.cat([first + torch.arange(size, device=device) for first, size in zip(starts, sizes)])
        for starts in ([part.start for part in taken], [passage.place for passage in passages])
    )
    keys = rotation.move_rows(torch.cat([part.keys for part in taken], dim=2), rows, old, new)
    return keys, torch.cat([part.values for part in taken], dim=2)


def slot_prefill(
    model: Any, sequences: Sequence[SlotSequence], entries: Sequence[Sequence[PassageEntry]], held_rows: int = 0
) -> PackedPrefill:
    """Return the input of the pass over the text of some sequences.

    Parameters
    ----------
    model : RefragForCausalLM
    sequences : B sequences
    entries : of each sequence's passages
    held_rows : int
        For one sequence: number of rows in its cache before its passages.
    """
    device = model.device
    texts = [text for sequence in sequences for text in sequence.texts]
    token_ids = torch.tensor([token for text in texts for token in text.token_ids], device=device)
    text_lengths = [[len(text.token_ids) for text in sequence.texts] for sequence in sequences]
    before = [[held_rows] * bool(held_rows) + [p.rows for p in sequence.passages] for sequence in sequences]
    key_lengths = [[*held, *own] for held, own in zip(before, text_lengths)]
    totals = [sum(lengths) for lengths in key_lengths]
    text_rows = [sum(lengths) for lengths in text_lengths]
    order = None
    if len(sequences) > 1:
        passage_row, text_row = 0, sum(totals) - sum(text_rows)
        places: list[int] = []
        for total, own in zip(totals, text_rows):
            places += range(passage_row, passage_row + total - own)
            places += range(text_row, text_row + own)
            passage_row, text_row = passage_row + total - own, text_row + own
        order = torch.tensor(places, device=device)
    sizes = torch.tensor(totals, device="cpu")
    ends = sizes.cumsum(0)
    padded = ends[:, None] + torch.arange(-max(totals), 0, device="cpu")
    return PackedPrefill(
        embeds=_text_embeds(model, token_ids),
        position_ids=torch.tensor([position for text in texts for position in text.positions], device=device),
        plans=AttentionPlans(
            ChunkLayout.from_lengths(text_lengths).to(device),
            _mask(sequences, bool(held_rows)),
            causal=True,
            kv_layout=ChunkLayout.from_lengths(key_lengths).to(device),
        ),
        rows=torch.maximum(padded, (ends - sizes)[:, None]).to(device),
        held=placed_rows(
            model.key_rotation,
            [passage for sequence in sequences for passage in sequence.passages],
            [entry for own in entries for entry in own],
            device,
            model.dtype,
        ),
        order=order,
        last=torch.tensor(text_rows, device=device).cumsum(0) - 1,
    )


def _text_embeds(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    no_slots = torch.full(token_ids.shape, -1, dtype=torch.int32, device=token_ids.device)
    weight = model.projector.up.weight
    return model.embed_rows(token_ids, no_slots, weight.new_zeros(0, model.config.chunk_width))


def _mask(sequences: Sequence[SlotSequence], held: bool) -> ChunkMask:
    """Return the mask over the rows held before, the passages and the texts of each sequence."""
    if all(text.passages == len(sequence.passages) for sequence in sequences for text in sequence.texts):
        return ChunkMask.full()
    matrices = []
    for sequence in sequences:
        passages = held + len(sequence.passages)
        size = passages + len(sequence.texts)
        allowed = torch.ones(size, size, dtype=torch.bool, device="cpu")
        for row, text in enumerate(sequence.texts, passages):
            allowed[row, held + text.passages : passages] = False
        matrices.append(allowed)
    return ChunkMask.from_dense(matrices)


def run(model: Any, prefill: PackedPrefill, cache: DynamicCache, received: list[torch.Tensor] | None = None) -> Any:
    """Run the text through the decoder; return its output with logits [1, B, V] of each sequence's last row.

    Parameters
    ----------
    model : RefragForCausalLM
    prefill : PackedPrefill
    cache : DynamicCache
        With the rows held before and the passages; extended by the text.
    received : list, optional
        Receives the attention that each key row of the plans received from the text, of each layer.
    """
    prefill.plans.received = received
    with torch.no_grad():
        return packed_pass(
            model.decoder,
            prefill.plans,
            inputs_embeds=prefill.embeds[None],
            position_ids=prefill.position_ids[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=prefill.last,
        )


def prefill_of(model: Any, prompt: MixedPrompt) -> PackedPrefill:
    """Return the input of the pass over the text of a prompt, and read its passages if their rows aren't known.

    Raises
    ------
    ValueError
        As ``sequences_of`` and ``entries_of``; or if the prompt has more positions than a decoder's sliding window.
    """
    sequences = sequences_of(prompt)
    require_window(model, prompt)
    return slot_prefill(model, sequences, entries_of_prompt(model, prompt, sequences))


def padded_slots(prefill: PackedPrefill) -> dict[str, Any]:
    """Return the arguments of ``generate`` for text after rows that are held already; see ``padded_inputs``."""
    assert prefill.last is not None
    rows = prefill.rows
    device = rows.device
    return {
        # Only the shape matters: the first step computes the packed prefill.
        "inputs_embeds": prefill.embeds.new_zeros(1, 1, 1).expand(*rows.shape, 1),
        # Padding repeats the first row.
        "attention_mask": torch.nn.functional.pad(rows[:, 1:] != rows[:, :-1], (0, 1), value=True).long(),
        # Each sequence continues from the position of its last row.
        "position_ids": prefill.position_ids[prefill.last][:, None] + torch.arange(1 - rows.shape[1], 1, device=device),
        "prefill": prefill,
    }


def entries_of_prompt(
    model: Any, prompt: MixedPrompt, sequences: Sequence[SlotSequence], *, full: bool = False
) -> list[list[PassageEntry]]:
    """Return the entries of the passages of each sequence of a prompt, as ``entries_of``."""
    assert prompt.kv_slots is not None
    result, first = [], 0
    total = sum(len(sequence.passages) for sequence in sequences)
    if prompt.passages is not None and len(prompt.passages) != total:
        raise ValueError(f"passages: got {len(prompt.passages)} entries, needs {total}, one for each passage")
    for sequence in sequences:
        count = len(sequence.passages)
        known = None if prompt.passages is None else prompt.passages[first : first + count]
        result.append(entries_of(model, sequence, prompt.kv_slots, known, sequence.beginning, full=full))
        first += count
    return result


def require_window(model: Any, prompt: MixedPrompt, held: int = 0) -> None:
    """Refuse a prompt with more positions than the decoder's sliding window.

    Raises
    ------
    ValueError
    """
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    positions = held + int(prompt.position_ids.max()) + 1 if len(prompt.position_ids) else held
    if window is not None and positions > window:
        raise ValueError(
            f"prompt: got {positions} positions, needs at most the {window} of the decoder's sliding window: windows "
            "count rows, of which slots leave some out"
        )
