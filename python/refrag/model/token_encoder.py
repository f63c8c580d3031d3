"""Encoders built from the decoder: from its embedding table alone, or from its first layers."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModel, BertConfig, BertModel, PreTrainedModel


def token_encoder(decoder: PreTrainedModel, *, layers: int = 0, places: int = 512) -> PreTrainedModel:
    """Build an encoder from a decoder's token embeddings.

    A pretrained encoder with its own tokenizer loses details that the decoder needs to reproduce a text: MiniLM's
    tokenizer, for example, drops case and line breaks. This encoder shares the decoder's tokenizer, so it loses no
    details, and it adds almost no computation. It has learned nothing about language, however, so its chunks need the
    pooling "concat".

    Parameters
    ----------
    decoder : PreTrainedModel
        Its embedding table is copied.
    layers : int
        Number of untrained transformer layers on top of the embeddings.
    places : int
        Maximum number of tokens in a chunk.

    Returns
    -------
    PreTrainedModel
        A BertModel with the decoder's hidden_size.

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
        # Position embeddings start small relative to the token embeddings, whose scale depends on the decoder.
        size = table.float().pow(2).mean().sqrt()
        encoder.embeddings.position_embeddings.weight.mul_(0.1 * size / 0.02)
        encoder.embeddings.token_type_embeddings.weight.zero_()
    # To mypy, transformers' decorator of `to` leaves self among the arguments.
    return encoder.to(device=table.device, dtype=table.dtype).train(decoder.training)  # type: ignore[call-arg]


@torch.no_grad()
def first_layers(decoder: PreTrainedModel, layers: int) -> PreTrainedModel:
    """Build an encoder from a decoder's token embeddings and its first layers.

    It attends in both directions under a non-causal plan, as in ``encode_packed``. The norm after its last layer has
    weights of 1, because the decoder's norm is fitted to the decoder's last layer. It shares the decoder's tokenizer.

    Parameters
    ----------
    decoder : PreTrainedModel
        A causal language model; its weights are copied.
    layers : int
        Number of layers to copy.

    Returns
    -------
    PreTrainedModel
        Has the decoder's hidden_size. Its config stores ``layers`` as ``decoder_layers``.

    Raises
    ------
    ValueError
        If the decoder has fewer layers, or its modules have other names than Llama's.

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
            raise ValueError(f"decoder: got {type(decoder).__name__} without {name}, needs a Llama-like decoder")
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
    # Layers read the attention implementation from their config: it must be the encoder's, not a copy of the decoder's.
    encoder.layers = nn.ModuleList(
        copy.deepcopy(layer, {id(source.config): config}) for layer in source.layers[:layers]
    )
    encoder.norm = copy.deepcopy(source.norm)
    encoder.norm.weight.fill_(1.0)
    encoder.rotary_emb = copy.deepcopy(source.rotary_emb)
    return encoder.train(decoder.training)  # type: ignore[no-any-return]
