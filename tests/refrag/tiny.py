"""Tiny random models and prompts for tests."""

import copy

import torch
from refrag import RefragForCausalLM
from refrag.model.inputs import Chunk, MixedPrompt, PackedTexts
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    Qwen3Config,
    RobertaConfig,
)

from refrag_kernels import ChunkLayout

VOCABULARY = 97
_DECODER = dict(
    vocab_size=VOCABULARY, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
_ENCODER = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=96,
)  # fmt: skip

DECODERS = {
    "llama": LlamaConfig(**_DECODER),
    "qwen3": Qwen3Config(**_DECODER),
    "mistral": MistralConfig(**_DECODER, sliding_window=11),
    "gemma": GemmaConfig(**_DECODER),
    "gemma3": Gemma3TextConfig(
        **_DECODER, sliding_window=9, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
}
ENCODERS = {
    "bert": BertConfig(**_ENCODER, pad_token_id=0),
    "roberta": RobertaConfig(**_ENCODER, pad_token_id=1),
    "modernbert": ModernBertConfig(
        **_ENCODER, pad_token_id=0, cls_token_id=1, sep_token_id=2, local_attention=12, global_attn_every_n_layers=2
    ),
}


def decoder(name):
    """Return a random decoder with Hugging Face's own attention."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(DECODERS[name]), attn_implementation="sdpa").eval()
    _spread(model)
    return model


def encoder(name):
    """Return a random encoder with Hugging Face's own attention."""
    torch.manual_seed(2)
    model = AutoModel.from_config(copy.deepcopy(ENCODERS[name]), attn_implementation="sdpa").eval()
    _spread(model)
    return model


def refrag(decoder_name="llama", encoder_name="bert", **fields):
    """Return a RefragForCausalLM with the same random weights as ``decoder`` and ``encoder``."""
    torch.manual_seed(3)
    model = RefragForCausalLM.from_parts(encoder(encoder_name), decoder(decoder_name), 4, **fields).eval()
    _spread(model.projector)
    return model


def _spread(model):
    # Initial weights are so small that attention is nearly uniform, which would hide mistakes.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)


def prompt(spans, *, seed=0):
    """Return a random MixedPrompt.

    ``spans`` holds each sequence's spans: ("text", rows), ("slot", passage) or ("expanded", rows, passage).
    """
    generator = torch.Generator().manual_seed(seed)

    def random_ids(count):
        return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()

    token_ids, slots, positions, lengths, passages, chunks, expanded, encoder_ids = [], [], [], [], [], [], set(), []
    for sequence in spans:
        lengths.append([])
        position = 0
        for kind, *rest in sequence:
            rows, passage = (1, rest[0]) if kind == "slot" else (rest[0], rest[1] if len(rest) > 1 else -1)
            slot = -1
            if kind != "text":
                if kind == "expanded":
                    expanded.add(len(chunks))
                else:
                    slot = len(chunks)
                chunks.append(Chunk("x", tuple(random_ids(4))))
                encoder_ids.append(random_ids(3 + len(chunks) % 17))
            token_ids += [0] if slot >= 0 else random_ids(rows)
            slots += [slot] * rows
            positions += range(position, position + rows)
            position += rows
            lengths[-1].append(rows)
            passages.append(passage)
    return MixedPrompt(
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        slot_of_row=torch.tensor(slots, dtype=torch.int32),
        position_ids=torch.tensor(positions, dtype=torch.int64),
        layout=ChunkLayout.from_lengths(lengths),
        passage_of_span=torch.tensor(passages, dtype=torch.int32),
        chunks=tuple(chunks),
        expanded=frozenset(expanded),
        encoder_input=PackedTexts(
            torch.tensor([token for ids in encoder_ids for token in ids], dtype=torch.int64),
            ChunkLayout.from_lengths([[len(ids) for ids in encoder_ids]]),
        ),
    )


MIXED = [
    [("text", 5), ("slot", 0), ("slot", 0), ("expanded", 4, 0), ("slot", 1), ("text", 7)],
    [("slot", 0), ("expanded", 3, 0), ("text", 21), ("slot", 1), ("slot", 2), ("text", 2)],
]
