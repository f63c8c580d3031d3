"""A small random Answerer with the real tokenizers."""

import torch
from refrag import RefragForCausalLM, RefragProcessor, weights
from refrag.integrations.answering import Answerer
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def parts(k=4):
    """Return a model and its processor."""
    tokenizer = AutoTokenizer.from_pretrained(weights.decoder_folder(), local_files_only=True)
    encoder_tokenizer = AutoTokenizer.from_pretrained(weights.encoder_folder(), local_files_only=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(tokenizer),
        max_position_embeddings=512, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    decoder = LlamaForCausalLM(config).eval()
    for parameter in decoder.parameters():
        # Initial weights are so small that the output would not depend on the input.
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    encoder = AutoModel.from_pretrained(weights.encoder_folder(), local_files_only=True)
    model = RefragForCausalLM.from_parts(encoder, decoder, k=k, preset="lclm").eval()
    return model, RefragProcessor.from_config(model.config, tokenizer, encoder_tokenizer)


def answerer(**options):
    """Return an Answerer that generates up to 32 tokens."""
    return Answerer(*parts(), **{"max_new_tokens": 32, "do_sample": False, **options})
