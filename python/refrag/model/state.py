"""Incremental prefill state: a decoder's keys and values, to which prompts and chunks are appended."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from refrag.model.attention import AttentionPlans, packed_pass
from refrag.model.inputs import Chunk, MixedPrompt, PackedTexts, PromptTooLongError
from refrag.model.passage_rows import PassageEntry, SlotRule
from refrag.model.slot_sequence import SlotSequence
from refrag_kernels import ChunkLayout, ChunkMask


class GenerationState:
    """The rows of one sequence that a decoder has read; ``RefragForCausalLM.read`` creates it.

    Reading and generating extend it. It doesn't change if an error occurs while something is appended.

    Attributes
    ----------
    cache : DynamicCache
        Keys and values of every row, also in layers with a sliding window, so that rows can be appended at any time.
    lengths : list of int
        Number of rows of each span read so far.
    passages : list of int
        Passage of each span; -1 for shared text.
    chunks : list of Chunk
        All chunks of the prompts read so far, compressed or not.
    next_position : int
        Position id of the next row.
    unread : list of int
        Generated tokens that the decoder hasn't read yet, usually the last one. They are read before the next rows.
    sequence : SlotSequence or None
        With key/value slots: the passages and texts read so far. None once embedding slots have been read.
    entries : tuple of PassageEntry
        With key/value slots: the keys and values of the passages.
    slot_rule : SlotRule or None
        With key/value slots: the rule of the last prompt.
    """

    def __init__(self) -> None:
        # Without a config, which would make layers with a sliding window drop rows: plans index all rows.
        self.cache = DynamicCache()
        self.lengths: list[int] = []
        self.passages: list[int] = []
        self.chunks: list[Chunk] = []
        self.next_position = 0
        self.unread: list[int] = []
        self.sequence: SlotSequence | None = SlotSequence()
        self.entries: tuple[PassageEntry, ...] = ()
        self.slot_rule: SlotRule | None = None
        self._logits: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """Number of rows read so far."""
        return sum(self.lengths)

    def tokens_of(self, chunk: int | str | Chunk) -> list[int]:
        """Return the tokens of a chunk, or, for a string, of all chunks of the passage with this id.

        Raises
        ------
        ValueError
            If the chunk or passage is unknown.
        """
        if isinstance(chunk, Chunk):
            return list(chunk.token_ids)
        return [token for number in self.numbers_of(chunk) for token in self.chunks[number].token_ids]

    def numbers_of(self, chunk: int | str | Chunk) -> list[int]:
        """Return the numbers, among all chunks read so far, of a chunk or of the chunks of the passage with an id.

        Raises
        ------
        ValueError
            If the chunk or passage is unknown.
        """
        if isinstance(chunk, str):
            of_passage = [number for number, one in enumerate(self.chunks) if one.passage == chunk]
            if not of_passage:
                ids = ", ".join(dict.fromkeys(repr(one.passage) for one in self.chunks if one.passage is not None))
                raise ValueError(f"chunk: got passage {chunk!r}, needs one of those read: {ids or 'none has an id'}")
            return of_passage
        if isinstance(chunk, Chunk) and chunk in self.chunks:
            return [self.chunks.index(chunk)]
        if not isinstance(chunk, int) or not 0 <= chunk < len(self.chunks):
            needs = f"0 to {len(self.chunks) - 1}" if self.chunks else "a Chunk: none was read"
            raise ValueError(f"chunk: got {chunk!r}, needs {needs}")
        return [chunk]

    @contextlib.contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Restore the state if the body raises an exception or is interrupted."""
        before = {
            name: list(value) if isinstance(value, list) else value
            for name, value in vars(self).items()
            if name != "cache"
        }
        # A dynamic layer never modifies its tensors in place: it replaces them with longer ones.
        layers: list[Any] = self.cache.layers[:]
        held = key_values(self.cache)
        try:
            yield
        except BaseException:
            vars(self).update(before)
            self.cache.layers = layers
            for layer, (keys, values) in zip(layers, held):
                layer.keys, layer.values = keys, values
            raise

    def last_logits(self) -> torch.Tensor:
        """Return the logits [1, 1, V] of the last row.

        Raises
        ------
        ValueError
            If the state is empty.
        """
        if self._logits is None:
            raise ValueError("state: is empty, needs a prompt: model.read(prompt)")
        return self._logits

    def note_prompt(self, prompt: MixedPrompt, logits: torch.Tensor | None) -> None:
        """Record a prompt whose keys and values have been added to the cache, and the logits of its last row."""
        if prompt.chunks:
            self.sequence = None
        elif self.sequence is not None:
            first = self.next_position + int(prompt.position_ids[0])
            self.sequence = self.sequence.with_text(prompt.token_ids.tolist(), first)
        self.passages += self.numbered(prompt)
        self.lengths += prompt.layout.lengths()[0]
        self.chunks += prompt.chunks
        self.next_position += int(prompt.position_ids.max()) + 1
        self._logits = logits
        self.unread = []

    def note_generated(self, token_ids: Sequence[int]) -> None:
        """Record generated tokens, and keep those that the decoder hasn't read yet."""
        read = self.cache.get_seq_length() - self.rows
        if read:
            if self.sequence is not None:
                self.sequence = self.sequence.with_text(list(token_ids[:read]), self.next_position)
            self.lengths.append(read)
            self.passages.append(-1)
            self.next_position += read
        self.unread = list(token_ids[read:])

    def replace_rows(
        self, cache: DynamicCache, sequence: SlotSequence, entries: Sequence[PassageEntry], logits: torch.Tensor
    ) -> None:
        """Replace all rows by those of the same sequence, with other chunks expanded and all tokens read."""
        self.next_position += len(self.unread)
        self.cache, self.sequence, self.entries, self._logits = cache, sequence, tuple(entries), logits
        self.unread = []
        # Text that is appended later attends to all rows, so their order in the cache doesn't matter.
        self.lengths, self.passages = [cache.get_seq_length()], [-1]

    def numbered(self, prompt: MixedPrompt) -> list[int]:
        """Return the passage of each span of a prompt, numbered after the passages read so far."""
        first = max(self.passages, default=-1) + 1
        return [passage if passage < 0 else first + passage for passage in prompt.passage_of_span.tolist()]

    def plans(self, prompt: MixedPrompt, decoder_mask: str) -> AttentionPlans:
        """Return the attention plans for appending a prompt to this state."""
        mask = ChunkMask.full()
        if decoder_mask == "passages":
            mask = ChunkMask.passages([*self.passages, *self.numbered(prompt)])
        keys = ChunkLayout.from_lengths([[*self.lengths, *prompt.layout.lengths()[0]]]).to(prompt.device)
        return AttentionPlans(prompt.layout, mask, causal=True, kv_layout=keys)


def key_values(cache: Cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the keys and the values [B, H, rows, D] of each layer of a cache that has attention layers only."""
    layers: list[Any] = cache.layers  # to mypy, some layer classes have no keys
    return [(layer.keys, layer.values) for layer in layers]


def append(model: Any, state: GenerationState, prompt: MixedPrompt | None, chunk_embeds: torch.Tensor | None) -> None:
    """Append a single-sequence prompt to ``state``; without a prompt, read only the tokens that are still unread.

    Parameters
    ----------
    model : RefragForCausalLM
    state : GenerationState
    prompt : MixedPrompt, optional
    chunk_embeds : Tensor [N, d_enc], optional

    Raises
    ------
    ValueError
        If the prompt has several sequences or no rows.
    PromptTooLongError
        If it doesn't fit into the decoder's window. The message states the excess rows and how many would fit.
    """
    if prompt is None:
        if not state.unread:
            return
        prompt = text_prompt(state.unread, model.config.latents)
    else:
        if prompt.layout.num_sequences != 1 or not prompt.layout.total_rows:
            raise ValueError(
                f"prompt: got {prompt.layout.num_sequences} sequences of {prompt.layout.total_rows} rows in total, "
                "needs one that is not empty: a state contains one sequence"
            )
        prompt = after_text(state.unread, prompt) if state.unread else prompt
    require_room(model, state, prompt.layout.total_rows, int(prompt.position_ids.max()) + 1)
    prompt = prompt.to(model.device)
    with state.restored_on_error(), torch.no_grad():
        output = packed_pass(
            model.decoder,
            state.plans(prompt, model.config.decoder_mask),
            inputs_embeds=model.embed(prompt, chunk_embeds)[None],
            position_ids=prompt.position_ids[None] + state.next_position,
            past_key_values=state.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        state.note_prompt(prompt, output.logits)


def require_room(model: Any, state: GenerationState, rows: int, positions: int) -> None:
    """Refuse more rows than fit into the decoder's window.

    Raises
    ------
    PromptTooLongError
    """
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window is None:
        return
    held = max(state.rows, state.next_position)
    over = max(state.rows + rows, state.next_position + positions) - window
    if over > 0:
        raise PromptTooLongError(
            f"prompt: {rows} rows after the {state.rows} rows of the state are {over} over the decoder's window of "
            f"{window}; {max(window - held, 0)} would fit"
        )


def _require_room_for_answer(model: Any, state: GenerationState, config: Any, options: dict[str, Any]) -> None:
    """Refuse to generate more tokens than fit into the decoder's window after a state's rows."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window is None:
        return
    wanted = {name: options.get(name) or getattr(config, name, None) for name in ("max_new_tokens", "max_length")}
    new = wanted["max_new_tokens"]
    if new is None:  # transformers' default length
        new = 20 if wanted["max_length"] is None else wanted["max_length"] - state.rows
    room = max(window - max(state.rows, state.next_position), 0)
    if new > room:
        raise PromptTooLongError(
            f"max_new_tokens: {new} tokens after the {state.rows} rows of the state are {new - room} over the "
            f"decoder's window of {window}; {room} would fit"
        )


def generate_from(model: Any, state: GenerationState, generate: Callable[..., Any], options: dict[str, Any]) -> Any:
    """Continue from a state with transformers' ``generate``, and record the generated tokens in the state.

    Raises
    ------
    ValueError
        If the options request several sequences or another cache.
    PromptTooLongError
        If the new tokens don't fit into the decoder's window.
    """
    config = options.get("generation_config") or model.generation_config
    for name in ("num_beams", "num_return_sequences"):
        wanted = options.get(name) or getattr(config, name, None) or 1
        if wanted != 1:
            raise ValueError(f"{name}: got {wanted}, needs 1 with a state, which contains one sequence")
    for name in ("past_key_values", "cache_implementation", "use_cache"):
        if options.get(name, config.use_cache if name == "use_cache" else None) not in (None, True):
            raise ValueError(f"{name}: got {options.get(name)!r} with a state, which has a cache of its own")
    rows, end = state.rows, state.next_position
    state.last_logits()  # raises if the state is empty
    _require_room_for_answer(model, state, config, options)
    result = generate(
        # Only the number of rows matters: the first step returns the state's logits.
        inputs_embeds=torch.zeros(1, 1, 1, dtype=model.dtype, device=model.device).expand(1, rows, 1),
        attention_mask=torch.ones(1, rows, dtype=torch.int64, device=model.device),
        position_ids=torch.arange(end - rows, end, device=model.device)[None],
        past_key_values=state.cache,
        prefill=state,
        **options,
    )
    state.note_generated(getattr(result, "sequences", result)[0].tolist())
    return result


def first_step(state: GenerationState) -> CausalLMOutputWithPast:
    """Return the output of the first generation step from a state, whose logits have already been computed."""
    return CausalLMOutputWithPast(logits=state.last_logits(), past_key_values=state.cache)


def text_prompt(token_ids: Sequence[int], latents: int = 1) -> MixedPrompt:
    """Return a prompt of one span of text, for a model with this number of latents."""
    rows = len(token_ids)
    return MixedPrompt(
        token_ids=torch.tensor(token_ids, dtype=torch.int64, device="cpu"),
        slot_of_row=torch.full((rows,), -1, dtype=torch.int32, device="cpu"),
        position_ids=torch.arange(rows, device="cpu"),
        layout=ChunkLayout.from_lengths([[rows]]),
        passage_of_span=torch.tensor([-1], dtype=torch.int32, device="cpu"),
        chunks=(),
        expanded=frozenset(),
        encoder_input=PackedTexts(torch.zeros(0, dtype=torch.int64, device="cpu"), ChunkLayout.from_lengths([[]])),
        latents=latents,
    )


def after_text(token_ids: Sequence[int], prompt: MixedPrompt) -> MixedPrompt:
    """Return a single-sequence prompt with tokens prepended to it, as text of its own."""
    text, prompt = text_prompt(token_ids), prompt.to("cpu")
    return dataclasses.replace(
        prompt,
        token_ids=torch.cat([text.token_ids, prompt.token_ids]),
        slot_of_row=torch.cat([text.slot_of_row, prompt.slot_of_row]),
        position_ids=torch.cat([text.position_ids, prompt.position_ids + len(token_ids)]),
        layout=ChunkLayout.from_lengths([[len(token_ids), *prompt.layout.lengths()[0]]]),
        passage_of_span=torch.cat([text.passage_of_span, prompt.passage_of_span]),
    )
