"""PassageCache: keys and values of passages, computed once and reused in every prompt that contains them.

This extends the paper: under ``ChunkMask.passages``, a passage attends only to itself and the shared text before it, so
its keys and values are the same in all prompts that begin with the same text (Block-Attention, arXiv 2409.15355).
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from refrag.model.acceptance import require_decoder
from refrag.model.inputs import MixedPrompt
from refrag.model.modeling import RefragForCausalLM
from refrag.model.passage_reading import read_passages
from refrag.model.passage_rows import PassageEntry, SlotRule
from refrag.model.slot_prefill import require_window
from refrag.model.slot_sequence import PlacedPassage, sequences_of
from refrag.model.slot_state import check_slots
from refrag.model.state import GenerationState, append, key_values, require_room


@dataclasses.dataclass(frozen=True)
class _Entry:
    keys: list[torch.Tensor]  # of each layer: [H, n, D], rotated to ``positions``
    values: list[torch.Tensor]
    positions: torch.Tensor  # int64 [n]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


class PassageCache:
    """Caches keys and values of passages, keyed by a digest of everything that they depend on.

    They depend on the content of the passage's rows (tokens, and the chunks of its slots), the shared text before the
    passages and the passage's distance from that text. Keys are stored with their original rotation; one more rotation
    in float32 moves them to their position in a prompt.

    If no text precedes the passages, or with ``position_ids="parallel"``, where every passage starts right after that
    text, a cached passage is reused at any place among the passages. With other position ids and text before the
    passages, it is reused only at the same distance from that text, because attention, and therefore the values, depend
    on the distance.

    With key/value slots (``slots="kv"``), a passage is read right behind the shared text, and of each chunk only the
    rows of its slots are cached: a ``PassageEntry``. It is found at any place, whichever chunks the prompt expands.

    Call ``clear`` after the model's weights have changed.

    Parameters
    ----------
    model : RefragForCausalLM
        With ``decoder_mask="passages"``.
    max_bytes : int, optional
        Evict the least recently used entries above this size.
    full : bool
        With key/value slots: cache all rows as well, so that expanding a chunk computes nothing. Otherwise a passage of
        which a chunk is expanded is read again.

    Attributes
    ----------
    hits, misses : int
        Numbers of passages found and computed, not counting the shared text before them.

    Raises
    ------
    ValueError
        If ``decoder_mask`` isn't "passages", or the decoder's keys can't be moved: it has no RoPE, or one that depends
        on the sequence length.
    """

    def __init__(self, model: RefragForCausalLM, max_bytes: int | None = None, *, full: bool = False) -> None:
        if model.config.decoder_mask != "passages":
            raise ValueError(
                f"decoder_mask: got {model.config.decoder_mask!r}, needs 'passages': otherwise a passage's keys and "
                "values depend on the passages before it"
            )
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"max_bytes: got {max_bytes}, needs 1 or more")
        if full and model.config.kv_slots is None:
            raise ValueError("full: got True, needs a model with slots='kv': other entries are always full")
        require_decoder(model.decoder)
        self.model = model
        self.max_bytes = max_bytes
        self.full = full
        self.hits = self.misses = 0
        self._rotation = model.key_rotation
        self._entries: collections.OrderedDict[bytes, Any] = collections.OrderedDict()  # _Entry, PassageEntry

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Size of all entries in bytes."""
        return sum(entry.nbytes for entry in self._entries.values())

    def clear(self) -> None:
        """Remove all entries."""
        self._entries.clear()

    def read(self, prompt: MixedPrompt, *, chunk_embeds: torch.Tensor | None = None) -> GenerationState:
        """Prefill a prompt, computing only uncached rows; ``model.generate(state=...)`` continues from there.

        Parameters
        ----------
        prompt : MixedPrompt
            One sequence: optional shared text, passages, shared text.
        chunk_embeds : Tensor [N, d_enc], optional
            Embeddings of the prompt's chunks. By default, the chunks of uncached passages are encoded here.

        Returns
        -------
        GenerationState
            As returned by ``model.read(prompt)``.

        Raises
        ------
        ValueError
            If the prompt has another structure, or more rows than the decoder's sliding window.
        PromptTooLongError
            If it doesn't fit into the decoder's window.
        """
        if prompt.kv_slots is not None:
            return self.model.read(self.attach(prompt), chunk_embeds=chunk_embeds)
        before, passages, after = _parts(prompt)
        self._check_rows(prompt)
        if chunk_embeds is None:
            chunk_embeds = prompt.chunk_embeds
        if chunk_embeds is not None:
            prompt = dataclasses.replace(prompt, chunk_embeds=chunk_embeds)
        with torch.no_grad():
            wanted = _keyed(prompt, before, passages)
            entries = self._found_or_read(prompt, wanted, shared=bool(before))
            state = GenerationState()
            self._fill(state, [entries[key] for key, _ in wanted], prompt, [*before, *sum(passages, [])])
            _append_spans(self.model, state, prompt, after)
        self._keep(entries)
        return state

    def attach(self, prompt: MixedPrompt) -> MixedPrompt:
        """Return a prompt with key/value slots together with the cached rows of its passages.

        Passages that aren't cached are read. The result can be passed to ``model.read`` and, also with several
        sequences, to ``model.generate``.

        Parameters
        ----------
        prompt : MixedPrompt
            With key/value slots; any number of sequences, which begin with the shared text.

        Raises
        ------
        ValueError
            If the prompt has no key/value slots, or as ``read``.
        """
        check_slots(self.model, prompt, None)
        if prompt.kv_slots is None:
            raise ValueError("prompt: got embedding slots, needs key/value slots: use read()")
        sequences = sequences_of(prompt)
        require_window(self.model, prompt)
        entries: dict[bytes, PassageEntry] = {}
        keys: list[bytes] = []
        for sequence in sequences:
            shared = sequence.beginning
            own = [_slot_key(prompt.kv_slots, shared, passage) for passage in sequence.passages]
            keys += own
            missing: dict[bytes, PlacedPassage] = {}
            for key, passage in zip(own, sequence.passages):
                held = entries.get(key) or self._entries.get(key)
                if held is None or held.full is None and passage.keep != held.slots.keep:
                    missing[key] = passage
                else:
                    entries[key] = held
            self.misses += len(missing)
            self.hits += len(own) - len(missing)
            if not missing:
                continue
            expanded = any(
                passage.keep != prompt.kv_slots.keep(passage.lengths)
                for key, passage in zip(own, sequence.passages)
                if key in missing
            )
            chunks = [passage.chunks for passage in missing.values()]
            read = read_passages(
                self.model, self._rotation, chunks, shared, prompt.kv_slots, full=self.full or expanded
            )
            entries.update(zip(missing, read))
        self._keep({key: one if self.full else dataclasses.replace(one, full=None) for key, one in entries.items()})
        return dataclasses.replace(prompt, passages=tuple(entries[key] for key in keys))

    def _check_rows(self, prompt: MixedPrompt) -> None:
        rows = prompt.layout.total_rows
        window = getattr(self.model.config.get_text_config(), "sliding_window", None)
        if window is not None and rows > window:
            raise ValueError(
                f"prompt: got {rows} rows, needs at most the {window} of the decoder's sliding window: beyond it, the "
                "keys that a passage attends to depend on its place"
            )
        require_room(self.model, GenerationState(), rows, int(prompt.position_ids.max()) + 1)

    def _found_or_read(
        self, prompt: MixedPrompt, wanted: list[tuple[bytes, list[int]]], shared: bool
    ) -> dict[bytes, _Entry]:
        """Return the entries of all parts, and compute the missing ones in one pass of the decoder.

        ``shared`` says whether the first part is the text before the passages.
        """
        entries = {key: self._entries[key] for key, _ in wanted if key in self._entries}
        missing = {key: spans for key, spans in wanted if key not in entries}
        found = sum(key in entries for key, _ in wanted[shared:])
        self.hits += found
        self.misses += len(wanted) - shared - found
        if not missing:
            return entries
        state = GenerationState()
        if shared and wanted[0][0] in entries:
            self._fill(state, [entries[wanted[0][0]]], prompt, wanted[0][1])
        first = state.rows
        _append_spans(self.model, state, prompt, sum(missing.values(), []))
        for key, spans in missing.items():
            part = prompt.take(spans)
            end = first + part.layout.total_rows
            rows = slice(first, end)
            entries[key] = _Entry(
                [keys[0, :, rows].clone() for keys, _ in key_values(state.cache)],
                [values[0, :, rows].clone() for _, values in key_values(state.cache)],
                part.position_ids.to(self.model.device),
            )
            first = end
        return entries

    def _fill(
        self, state: GenerationState, entries: Sequence[_Entry], prompt: MixedPrompt, spans: Sequence[int]
    ) -> None:
        """Move entries to their positions in the prompt and put them into an empty state."""
        if not entries:
            return
        part = prompt.take(spans)
        places = part.position_ids.to(self.model.device).split([len(entry.positions) for entry in entries])
        moved = [self._rotation.move(entry.keys, entry.positions, place) for entry, place in zip(entries, places)]
        for index in range(len(entries[0].keys)):
            keys = torch.cat([layers[index] for layers in moved], dim=1)
            values = torch.cat([entry.values[index] for entry in entries], dim=1)
            state.cache.update(keys[None], values[None], index)
        state.note_prompt(part, None)

    def _keep(self, entries: Mapping[bytes, _Entry | PassageEntry]) -> None:
        for key, entry in entries.items():
            self._entries[key] = entry
            self._entries.move_to_end(key)
        if self.max_bytes is not None:
            held = self.nbytes
            while held > self.max_bytes:
                _, dropped = self._entries.popitem(last=False)
                held -= dropped.nbytes


def _parts(prompt: MixedPrompt) -> tuple[list[int], list[list[int]], list[int]]:
    """Return the spans before the passages, the spans of each passage, and the spans after them."""
    if prompt.layout.num_sequences != 1:
        raise ValueError(f"prompt: got {prompt.layout.num_sequences} sequences, needs one")
    before: list[int] = []
    passages: list[list[int]] = []
    after: list[int] = []
    last = -1
    for span, passage in enumerate(prompt.passage_of_span.tolist()):
        if passage < 0:
            (after if passages else before).append(span)
            continue
        if after:
            raise ValueError(
                f"prompt: got shared text between passages (span {after[0]}), needs it only before the first or after "
                "the last: a passage after it would depend on the passages before it"
            )
        if passage != last:
            passages.append([])
        passages[-1].append(span)
        last = passage
    if len(passages) != len({int(prompt.passage_of_span[spans[0]]) for spans in passages}):
        raise ValueError("prompt: got a passage in two places, needs its chunks to be adjacent")
    if not after:
        if passages or not before:
            raise ValueError("prompt: ends with a passage or is empty, needs text after the passages")
        before, after = [], before
    return before, passages, after


def _keyed(prompt: MixedPrompt, before: list[int], passages: list[list[int]]) -> list[tuple[bytes, list[int]]]:
    """Return the key and the spans of the text before the passages, if there is any, and of each passage."""
    host = prompt.to("cpu")
    if not before:
        return [(_digest(b"alone", _content(host, spans)), spans) for spans in passages]
    beginning = _digest(b"text", _content(host, before))
    end = int(host.position_ids[_rows(host, before)].max()) + 1
    wanted = [(beginning, before)]
    for spans in passages:
        distance = str(int(host.position_ids[_rows(host, spans)][0]) - end).encode()
        wanted.append((_digest(b"behind", beginning, distance, _content(host, spans)), spans))
    return wanted


def _slot_key(rule: SlotRule, shared: Sequence[int], passage: PlacedPassage) -> bytes:
    """Return the key of an entry for key/value slots."""
    pieces = (list(shared), *(chunk.token_ids for chunk in passage.chunks))
    return _digest(
        b"slots",
        repr(rule).encode(),
        *(_bytes(torch.tensor(piece, dtype=torch.int64, device="cpu")) for piece in pieces),
    )


def _rows(prompt: MixedPrompt, spans: list[int]) -> slice:
    """Return the rows of adjacent spans."""
    offsets = prompt.layout.chunk_offsets
    return slice(int(offsets[spans[0]]), int(offsets[spans[-1] + 1]))


def _content(prompt: MixedPrompt, spans: list[int]) -> bytes:
    """Return a digest of everything that determines the spans' embeddings and relative positions."""
    rows = _rows(prompt, spans)
    slots, positions = prompt.slot_of_row[rows], prompt.position_ids[rows]
    chunks = (slots[slots >= 0] // prompt.latents).unique().tolist()
    if prompt.chunk_embeds is not None:
        behind = [b"embedding", *(_bytes(prompt.chunk_embeds[chunk]) for chunk in chunks)]
    else:
        texts = prompt.encoder_input
        starts = texts.layout.chunk_offsets.tolist()
        behind = [b"text", *(_bytes(texts.token_ids[starts[chunk] : starts[chunk + 1]]) for chunk in chunks)]
    is_slot = (slots >= 0).to(torch.uint8)
    return _digest(_bytes(prompt.token_ids[rows]), _bytes(is_slot), _bytes(positions - positions[0]), *behind)


def _bytes(tensor: torch.Tensor) -> bytes:
    return str(tensor.dtype).encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _digest(*pieces: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.digest()


def _append_spans(model: RefragForCausalLM, state: GenerationState, prompt: MixedPrompt, spans: list[int]) -> None:
    """Append some spans of a prompt to a state, at their positions in the prompt."""
    part = prompt.take(spans)
    append(model, state, dataclasses.replace(part, position_ids=part.position_ids - state.next_position), None)
