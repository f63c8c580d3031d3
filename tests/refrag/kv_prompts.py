"""Tiny models with key/value slots, and prompts for them."""

import copy

import torch
from refrag.model.inputs import Chunk
from refrag.model.packing import pack_spans
from refrag.model.passage_rows import SlotRule

from tests.refrag import tiny

K = 4


def model_of(name="llama", rule=None, **fields):
    rule = rule or SlotRule()
    kv = dict(slots="kv", slot_rows=rule.rows, slot_rule=rule.rule, slot_whole=rule.whole)
    return tiny.refrag(name, **{"decoder_mask": "passages", "position_ids": "original", **kv, **fields})


def plain_of(model):
    """Return the model with the same weights for embedding slots."""
    plain = copy.deepcopy(model)
    plain.config.slots = "embedding"
    return plain


def tokens(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, tiny.VOCABULARY, (count,), generator=generator).tolist()


def passage(lengths, seed):
    return [Chunk(f"{seed}.{i}", tuple(tokens(n, 100 * seed + i)), f"p{seed}") for i, n in enumerate(lengths)]


A, B, C = passage((4, 4, 2), 1), passage((4, 1), 2), passage((4, 4, 4, 3), 3)
BEFORE, AFTER = tokens(5, 7), tokens(6, 8)


def packed(model, *sequences, expanded=(), all_text=False):
    """Pack sequences of passages and text; every chunk is text in ``all_text``."""
    spans = []
    for parts in sequences:
        own, number = [], 0
        for part in parts:
            if isinstance(part[0], Chunk):
                own += [(number, chunk) for chunk in part]
                number += 1
            else:
                own.append((-1, part))
        spans.append(own)
    chunks = sum(isinstance(span, Chunk) for own in spans for _, span in own)
    rule = model.config.kv_slots
    if rule is not None:
        whole = set(expanded)
        first = 0
        for parts in sequences:
            for part in parts:
                if isinstance(part[0], Chunk):
                    whole |= {first + len(part) - 1 - i for i in range(min(rule.whole, len(part)))}
                    first += len(part)
        expanded = whole
    return pack_spans(
        spans, range(chunks) if all_text else expanded, None, position_ids=model.config.position_ids, kv_slots=rule,
        chunk_embeds=torch.zeros(chunks, 32) if rule is None else None,
    )  # fmt: skip
