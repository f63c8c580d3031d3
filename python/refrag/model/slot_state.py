"""Generation states with key/value slots: prompts are appended to them, and chunks put back whole in them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from refrag.model.inputs import Chunk, MixedPrompt
from refrag.model.slot_prefill import entries_of, require_window, run, slot_prefill
from refrag.model.slot_sequence import sequences_of
from refrag.model.state import GenerationState, after_text, append, require_room


def append_prompt(
    model: Any, state: GenerationState, prompt: MixedPrompt | None, chunk_embeds: torch.Tensor | None
) -> None:
    """Append a single-sequence prompt with slots of either kind to a state; see ``append``."""
    if prompt is not None:
        check_slots(model, prompt, chunk_embeds)
    if prompt is not None and prompt.kv_slots is not None:
        append_slots(model, state, prompt)
    else:
        append(model, state, prompt, chunk_embeds)


def check_slots(model: Any, prompt: MixedPrompt, chunk_embeds: torch.Tensor | None) -> None:
    """Refuse a prompt that was packed for other slots than those of the model's config.

    Raises
    ------
    ValueError
    """
    wanted = model.config.kv_slots
    if prompt.chunks and prompt.kv_slots != wanted:
        got, needs = (one or "embedding slots" for one in (prompt.kv_slots, wanted))
        raise ValueError(f"prompt: got {got}, needs {needs}, those of the model's config")
    if prompt.kv_slots is not None and chunk_embeds is not None:
        raise ValueError("chunk_embeds: got a tensor, needs None with key/value slots, which have no embeddings")


def append_slots(model: Any, state: GenerationState, prompt: MixedPrompt) -> None:
    """Append a single-sequence prompt with key/value slots to a state.

    Its passages are read behind the text at the beginning of the state, as those before them.

    Raises
    ------
    ValueError
        If the prompt has several sequences, ends with a passage, or doesn't fit its entries or the state.
    PromptTooLongError
        If it doesn't fit into the decoder's window.
    """
    if prompt.layout.num_sequences != 1:
        raise ValueError(f"prompt: got {prompt.layout.num_sequences} sequences, needs one: a state holds one sequence")
    if state.sequence is None:
        raise ValueError("state: has read embedding slots, needs key/value slots, as the prompt has")
    assert (rule := prompt.kv_slots) is not None
    prompt = after_text(state.unread, prompt) if state.unread else prompt
    require_room(model, state, prompt.layout.total_rows, int(prompt.position_ids.max()) + 1)
    require_window(model, prompt, state.next_position)
    (new,) = sequences_of(prompt, state.next_position)
    whole = state.sequence.followed_by(new)
    entries = entries_of(model, new, rule, prompt.passages, whole.beginning)
    with state.restored_on_error():
        prefill = slot_prefill(model, [new], [entries], state.rows)
        _fill(state.cache, prefill.held)
        output = run(model, prefill, state.cache)
        state.note_prompt(prompt, output.logits)
        state.sequence, state.entries, state.slot_rule = whole, (*state.entries, *entries), rule


def expand_slots(model: Any, state: GenerationState, chunk: int | str | Chunk) -> None:
    """Put the rows of a chunk, or of a passage's chunks, back in place of their slots.

    The state's text, which has attended to the slots, goes through the decoder once more. The state then equals one
    that was read with the chunk expanded.

    Raises
    ------
    ValueError
        If the chunk or passage is unknown.
    PromptTooLongError
        If the rows don't fit into the decoder's window.
    """
    numbers = state.numbers_of(chunk)
    assert state.sequence is not None and state.slot_rule is not None
    sequence = state.sequence
    if state.unread:
        sequence = sequence.with_text(state.unread, state.next_position)
    sequence = sequence.expanded(numbers)
    rows = sum(passage.rows for passage in sequence.passages) + sum(len(text.token_ids) for text in sequence.texts)
    require_room(model, state, rows - state.rows, len(state.unread))
    entries = entries_of(model, sequence, state.slot_rule, state.entries, sequence.beginning)
    prefill = slot_prefill(model, [sequence], [entries])
    cache = DynamicCache()
    _fill(cache, prefill.held)
    output = run(model, prefill, cache)
    state.replace_rows(cache, sequence, entries, output.logits)


def _fill(cache: DynamicCache, held: tuple[torch.Tensor, torch.Tensor] | None) -> None:
    if held is not None:
        for index, (keys, values) in enumerate(zip(*held)):
            cache.update(keys[None], values[None], index)
