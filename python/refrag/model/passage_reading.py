"""Reads passages with the decoder once, behind the shared text, and keeps rows of them for key/value slots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache

import refrag_kernels as rk
from refrag.model.attention import AttentionPlans, packed_pass
from refrag.model.inputs import Chunk, PromptTooLongError
from refrag.model.key_rotation import KeyRotation
from refrag.model.passage_rows import PassageEntry, PassageRows, SlotRule, all_rows
from refrag.model.state import key_values
from refrag_kernels import ChunkLayout, ChunkMask

_Layers = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values [H, T, D] of each layer
_BATCH_ROWS = 8192  # rows of passages in one pass of the decoder, unless a single passage has more


def read_passages(
    model: Any,
    rotation: KeyRotation,
    passages: Sequence[Sequence[Chunk]],
    shared: Sequence[int],
    rule: SlotRule,
    *,
    full: bool = False,
    batch_rows: int = _BATCH_ROWS,
) -> list[PassageEntry]:
    """Read passages, each on its own right behind the shared text, and keep the rows that a rule selects.

    Parameters
    ----------
    model : RefragForCausalLM
    rotation : KeyRotation
        The decoder's.
    passages : sequence of sequences of Chunk
        The chunks of each passage.
    shared : sequence of int
        Tokens of the text before the passages, such as a start token.
    rule : SlotRule
    full : bool
        Whether to keep all rows as well.
    batch_rows : int
        Maximum number of passage rows in one pass, unless a single passage has more.

    Returns
    -------
    list of PassageEntry

    Raises
    ------
    ValueError
        If a passage has a chunk without tokens or doesn't fit into the decoder's sliding window, the decoder's layers
        have different key/value heads, or a layer's scores aren't finite.
    PromptTooLongError
        If a passage doesn't fit into the decoder's window.
    """
    lengths = [[len(chunk.token_ids) for chunk in chunks] for chunks in passages]
    for index, own in enumerate(lengths):
        _check_passage(model, passages[index], own, len(shared), index)
    entries: list[PassageEntry] = []
    for first, last in _batches([sum(own) for own in lengths], batch_rows):
        entries += _read(model, rotation, passages[first:last], lengths[first:last], list(shared), rule, full)
    return entries


def _check_passage(model: Any, chunks: Sequence[Chunk], lengths: list[int], shared: int, index: int) -> None:
    if not lengths or min(lengths) < 1:
        name = (chunks[0].passage if chunks else None) or index
        raise ValueError(f"passage {name!r}: has no chunks or one without tokens, needs at least one token in each")
    rows = shared + sum(lengths)
    config = model.config.get_text_config()
    for field, error in (("sliding_window", ValueError), ("max_position_embeddings", PromptTooLongError)):
        window = getattr(config, field, None)
        if window is not None and rows > window:
            raise error(
                f"passage {chunks[0].passage or index!r}: got {rows} rows with the text before it, needs at most the "
                f"{window} of the decoder's {field}"
            )


def _batches(sizes: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of adjacent passages with at most this many rows, or one passage."""
    first = rows = 0
    for index, size in enumerate(sizes):
        if index > first and rows + size > most:
            yield first, index
            first, rows = index, 0
        rows += size
    if first < len(sizes):
        yield first, len(sizes)


def _read(
    model: Any,
    rotation: KeyRotation,
    passages: Sequence[Sequence[Chunk]],
    lengths: list[list[int]],
    shared: list[int],
    rule: SlotRule,
    full: bool,
) -> list[PassageEntry]:
    device, before = model.device, len(shared)
    sizes = [sum(own) for own in lengths]
    token_ids = shared + [token for chunks in passages for chunk in chunks for token in chunk.token_ids]
    places = [*range(before), *(before + row for size in sizes for row in range(size))]
    token_positions = torch.tensor(places, device=device)
    spans = [before] * bool(before) + sizes
    mask = ChunkMask.passages([-1] * bool(before) + list(range(len(sizes))))
    plans = AttentionPlans(ChunkLayout.from_lengths([spans]).to(device), mask, causal=True)
    plans.received = [] if rule.rule == "received" else None
    cache = DynamicCache()
    with torch.no_grad():
        packed_pass(
            model.decoder,
            plans,
            input_ids=torch.tensor([token_ids], device=device),
            position_ids=token_positions[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        layers = [(keys[0, :, before:], values[0, :, before:]) for keys, values in key_values(cache)]
        _check_layers(layers)
        if plans.received is not None and len(plans.received) != len(layers):
            raise ValueError(
                f"decoder: got {len(plans.received)} attention layers over {len(layers)} layers of keys and values, "
                "needs as many for the rule 'received'"
            )
        received = None if plans.received is None else [scores[before:] for scores in plans.received]
        kept = _kept(rotation, layers, token_positions[before:], lengths, rule, received)
        return list(_split(layers, kept, lengths, rule, before, full))


def _check_layers(layers: _Layers) -> None:
    shapes = {tuple(tensor.shape[::2]) for pair in layers for tensor in pair}
    if len(shapes) > 1:
        raise ValueError(
            f"decoder: got layers with keys and values of {sorted(shapes)} heads and head_dim, needs the same in all "
            "layers for key/value slots"
        )


def _kept(
    rotation: KeyRotation,
    layers: _Layers,
    positions: torch.Tensor,
    lengths: list[list[int]],
    rule: SlotRule,
    received: list[torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the keys and values [L, H, n, D] that the rule keeps of all passages, and their rows, int32 [L, H, n]."""
    offsets = torch.tensor([0, *(length for own in lengths for length in own)], dtype=torch.int32, device="cpu")
    offsets = offsets.cumsum(0).int()
    kept_offsets = rk.kept_offsets(offsets, [count for own in lengths for count in rule.keep(own)])
    count, device = int(kept_offsets[-1]), positions.device
    offsets, kept_offsets = offsets.to(device), kept_offsets.to(device)
    tables = rotation.tables(positions) if received is None else None
    # One synchronization for all layers.
    judged = [keys for keys, _ in layers] if received is None else received
    finite = torch.stack([layer.isfinite().all() for layer in judged]).tolist()
    if not all(finite):
        raise ValueError(
            f"scores: got NaN or inf in layer {finite.index(False)}, needs finite numbers: the decoder overflows"
        )
    kept = []
    for index, (keys, values) in enumerate(layers):
        scores = None if received is None else received[index]
        cos, sin = (None, None) if tables is None else tables[index]
        kept.append(
            rk.select_chunk_rows(
                keys.transpose(0, 1), values.transpose(0, 1), offsets, kept_offsets, count, scores, cos=cos, sin=sin
            )
        )
    keys, values, rows = (torch.stack(part).transpose(1, 2) for part in zip(*kept))
    return keys, values, rows


def _split(
    layers: _Layers,
    kept: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    lengths: list[list[int]],
    rule: SlotRule,
    start: int,
    full: bool,
) -> Iterator[PassageEntry]:
    """Yield the entry of each passage, which shares no memory with the others."""
    keys, values, rows = kept
    token = row = 0
    for own in lengths:
        keep, tokens = rule.keep(own), sum(own)
        picked = slice(row, row + sum(keep))
        # clone() alone would keep the strides of the transposed tensors.
        slots = PassageRows(
            keys[:, :, picked].clone(memory_format=torch.contiguous_format),
            values[:, :, picked].clone(memory_format=torch.contiguous_format),
            (rows[:, :, picked] - token).contiguous(),
            tuple(own),
            keep,
            start,
        )
        whole = None
        if full:
            states = [torch.stack([pair[which][:, token : token + tokens] for pair in layers]) for which in (0, 1)]
            whole = all_rows(*states, lengths=own, start=start)
        yield PassageEntry(slots, whole)
        token, row = token + tokens, picked.stop
