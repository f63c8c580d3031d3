"""Tiny models with key/value slots, and prompts for them."""

import copy

import torch
from refrag.model.inputs import Chunk
from refrag.model.packing import pack_spans
from refrag.model.passage_rows import SlotRule
from transformers import AutoModelForCausalLM, DynamicCache

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


def by_hand(model, parts, rule, expanded=()):
    """Compute with Hugging Face's own code: each passage read apart, rows gathered, keys moved.

    ``parts`` begin with text; ``expanded`` numbers the chunks that stay whole. Returns the last row's logits, and the
    attention that each chunk received from the text, summed over rows, heads and layers.
    """
    decoder = AutoModelForCausalLM.from_config(copy.deepcopy(tiny.DECODERS["llama"]), attn_implementation="eager")
    decoder.load_state_dict(model.decoder.state_dict())
    decoder.eval().double()
    shared, chunk, position = parts[0], 0, 0
    cache = DynamicCache()
    layers = [([], []) for _ in range(3)]
    kept = []  # rows of each chunk
    texts = []  # tokens, first position, number of rows of passages before it
    for part in parts:
        if not isinstance(part[0], Chunk):
            texts.append((part, position, sum(k.shape[1] for k in layers[0][0])))
            position += len(part)
            continue
        own = [token for one in part for token in one.token_ids]
        read = decoder(torch.tensor([shared + own]), use_cache=True, output_attentions=True)
        first = 0
        for index, one in enumerate(part):
            n = len(one.token_ids)
            whole = chunk in expanded or index >= len(part) - rule.whole
            kept.append(n if whole else min(rule.rows, n))
            rows = slice(len(shared) + first, len(shared) + first + n)
            for layer, (keys, values) in enumerate(layers):
                k, v = (
                    x[0] for x in (read.past_key_values.layers[layer].keys, read.past_key_values.layers[layer].values)
                )
                k = turned(k, torch.full((k.shape[1],), position - len(shared)))
                k_rows, v_rows = k[:, rows], v[:, rows]
                flat = turned(k, -torch.arange(position - len(shared), position - len(shared) + k.shape[1]))[:, rows]
                if rule.rule == "received":
                    score = read.attentions[layer][0].unflatten(0, (2, 2))[..., len(shared) :, rows].sum((1, 2))
                else:
                    score = -torch.cosine_similarity(flat, flat.mean(1, keepdim=True), dim=-1)
                best = score.topk(kept[-1]).indices.sort().values[..., None].expand(-1, -1, 16)
                keys.append(k_rows.gather(1, best))
                values.append(v_rows.gather(1, best))
            first, chunk = first + n, chunk + 1
        position += len(own)
    for layer, (keys, values) in enumerate(layers):
        cache.update(torch.cat(keys, 1)[None], torch.cat(values, 1)[None], layer)
    held = cache.get_seq_length()
    ids = [token for text, _, _ in texts for token in text]
    mask = torch.zeros(1, 1, len(ids), held + len(ids), dtype=torch.float64)
    mask[..., held:] = torch.triu(torch.full((len(ids), len(ids)), float("-inf")), 1)
    row = 0
    for text, _, seen in texts:
        mask[..., row : row + len(text), seen:held] = float("-inf")
        row += len(text)
    positions = torch.tensor([[first + i for text, first, _ in texts for i in range(len(text))]])
    inputs = dict(past_key_values=cache, attention_mask=mask, position_ids=positions, output_attentions=True)
    output = decoder(torch.tensor([ids]), **inputs)
    of_row = torch.stack(output.attentions)[..., :held].sum((0, 1, 2, 3))
    return output.logits[:, -1:], torch.stack([part.sum() for part in of_row.split(kept)])


def turned(keys, by):
    """Rotate keys [H, n, D] by a number of positions each, with complex numbers."""
    angles = by[:, None].double() * 1e4 ** (-torch.arange(8, dtype=torch.float64) / 8)
    pairs = torch.complex(keys[..., :8].double(), keys[..., 8:].double())
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], -1)
