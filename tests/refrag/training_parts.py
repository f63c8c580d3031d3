"""Small models with the demo's tokenizers, and documents, for the training tests."""

import numpy as np
import torch
from refrag import RefragForCausalLM
from refrag.bundle import ModelBundle, start_projector
from refrag.data.documents import Documents
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

WORDS = "the a of bridge river town stood built when who year stone arch old new near by was is and in to it".split()


def parts(tokenizer, encoder_tokenizer, *, k=4, **fields):
    """Return small random models with attention and dropout as in training."""
    torch.manual_seed(5)
    decoder = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
        )
    )  # fmt: skip
    encoder = BertModel(
        BertConfig(
            vocab_size=len(encoder_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=4, hidden_dropout_prob=0.1,
        )
    )  # fmt: skip
    model = RefragForCausalLM.from_parts(encoder, decoder, k, **fields)
    start_projector(model)
    return ModelBundle(model, tokenizer, encoder_tokenizer)


def documents(tokenizer, *, count=12, words=120, seed=0):
    """Return documents of random words."""
    generator = np.random.default_rng(seed)
    ids = [tokenizer(" ".join(generator.choice(WORDS, words)))["input_ids"] for _ in range(count)]
    return Documents(np.concatenate(ids), np.concatenate([[0], np.cumsum([len(own) for own in ids])]))
