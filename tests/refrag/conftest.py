"""Small random models of each architecture, and the demo's real weights, loaded once per session."""

import copy
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from refrag import RefragForCausalLM, RefragProcessor, weights
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from tests.refrag import tiny


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(weights.decoder_folder(), local_files_only=True)


@pytest.fixture(scope="session")
def encoder_tokenizer():
    return AutoTokenizer.from_pretrained(weights.encoder_folder(), local_files_only=True)


@pytest.fixture(scope="session")
def smollm2():
    """The decoder with Hugging Face's own code."""
    return AutoModelForCausalLM.from_pretrained(weights.decoder_folder(), attn_implementation="sdpa").eval()


@pytest.fixture(scope="session")
def minilm():
    """The encoder with Hugging Face's own code."""
    return AutoModel.from_pretrained(weights.encoder_folder(), attn_implementation="sdpa").eval()


@pytest.fixture(scope="session")
def demo_model():
    from refrag.demo.demo import Models

    return Models.load(16).refrag


@pytest.fixture(scope="session")
def decoders():
    """Tiny random decoders by name, with Hugging Face's own code."""
    return {name: tiny.decoder(name) for name in tiny.DECODERS}


@pytest.fixture(scope="session")
def kv_model(tokenizer, encoder_tokenizer):
    """A tiny random model with key/value slots for the real tokenizers."""
    config = copy.deepcopy(tiny.DECODERS["llama"])
    config.vocab_size, config.num_hidden_layers = len(tokenizer), 2
    torch.manual_seed(1)
    decoder = AutoModelForCausalLM.from_config(config).eval()
    tiny._spread(decoder)
    config = copy.deepcopy(tiny.ENCODERS["bert"])
    config.vocab_size = len(encoder_tokenizer)
    encoder = AutoModel.from_config(config).eval()
    return RefragForCausalLM.from_parts(encoder, decoder, 8, preset="kv", slot_whole=1).eval()


@pytest.fixture(scope="session")
def kv_processor(kv_model, tokenizer, encoder_tokenizer):
    return RefragProcessor.from_config(kv_model.config, tokenizer, encoder_tokenizer)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield
