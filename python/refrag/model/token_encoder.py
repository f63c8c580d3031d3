"""Encoders that are made of the decoder: of its embedding table alone, or of its first layers."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModel, BertConfig, BertModel, PreTrainedModel


def token_encoder(decoder: PreTrainedModel, *, layers: int = 0, places: int = 512) -> PreTrainedModel:
    """Return an encoder on a decoder's token embeddings.

    A pretrained encoder with a tokenizer of its own loses what the decoder has to write: MiniLM's, say, knows no
    capitals and no line ends. This one loses nothing and costs next to nothing; what it lacks is any knowledge of
    language, which is why its chunks want pooling "concat". Its tokenizer is the decoder's.

    Parameters
    ----------
    decoder : PreTrainedModel
        Its embedding table is copied.
    layers : int
        Transformer layers over the embeddings, untrained.
    places : int
        Tokens of the longest chunk.

    Returns
    -------
    PreTrainedModel
        A BertModel as wide as the decoder.

    Raises
    ------
    ValueError
        If ``layers`` is below 0.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    >>> token_encoder(LlamaForCausalLM(LlamaConfig(**small))).config.hidden_size
    32
    """
    if layers < 0:
        raise ValueError(f"layers: got {layers}, needs 0 or more")
    table = cast(nn.Embedding, decoder.get_input_embeddings()).weight
    heads = decoder.config.num_attention_heads
    config = BertConfig(
        vocab_size=table.shape[0],
        hidden_size=table.shape[1],
        num_hidden_layers=layers,
        num_attention_heads=heads if table.shape[1] % heads == 0 else 1,
        intermediate_size=4 * table.shape[1],
        max_position_embeddings=places,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = BertModel(config, add_pooling_layer=False)
    with torch.no_grad():
        encoder.embeddings.word_embeddings.weight.copy_(table)
        # Places start small beside the tokens, whose sizes differ from decoder to decoder.
        size = table.float().pow(2).mean().sqrt()
        encoder.embeddings.position_embeddings.weight.mul_(0.1 * size / 0.02)
        encoder.embeddings.token_type_embeddings.weight.zero_()
    # transformers' decorator of `to` keeps self among the arguments for mypy.
    return encoder.to(device=table.device, dtype=table.dtype).train(decoder.training)  # type: ignore[call-arg]


@torch.no_grad()
def first_layers(decoder: PreTrainedModel, layers: int) -> PreTrainedModel:
    """Return an encoder made of a decoder's token embeddings and its first layers.

    It attends in both directions where a plan without causality is given, as ``encode_packed`` does. The norm behind
    the last layer has weights of 1: the decoder's own norm is fitted to its last layer. Its tokenizer is the decoder's.

    Parameters
    ----------
    decoder : PreTrainedModel
        A causal language model; its weights are copied.
    layers : int
        How many of its layers, from the first.

    Returns
    -------
    PreTrainedModel
        As wide as the decoder. Its config notes ``layers`` as ``decoder_layers``.

    Raises
    ------
    ValueError
        If the decoder doesn't have so many layers, or its parts have other names than Llama's.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, vocab_size=50)
    >>> len(first_layers(LlamaForCausalLM(LlamaConfig(**small)), 2).layers)
    2
    """
    if not 1 <= layers <= decoder.config.num_hidden_layers:
        raise ValueError(f"layers: got {layers}, needs 1 to {decoder.config.num_hidden_layers}, the decoder's")
    source: Any = decoder.base_model
    for name in ("embed_tokens", "layers", "norm"):
        if not hasattr(source, name):
            raise ValueError(f"decoder: got {type(decoder).__name__} without {name}, needs one of Llama's kind")
    config = copy.deepcopy(decoder.config)
    config.num_hidden_layers = layers
    config.use_cache = False
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    config.decoder_layers = layers
    config.name_or_path = ""
    with torch.device("meta"):
        encoder: Any = AutoModel.from_config(config)
    encoder.embed_tokens = copy.deepcopy(source.embed_tokens)
    # Layers look into the config for the attention to run: into the encoder's, not into a copy of the decoder's.
    encoder.layers = nn.ModuleList(
        copy.deepcopy(layer, {id(source.config): config}) for layer in source.layers[:layers]
    )
    encoder.norm = copy.deepcopy(source.norm)
    encoder.norm.weight.fill_(1.0)
    encoder.rotary_emb = copy.deepcopy(source.rotary_emb)
    return encoder.train(decoder.training)  # type: ignore[no-any-return]
