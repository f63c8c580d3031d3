"""An encoder that reads the decoder's own tokens: its embedding table, places, and a few layers or none."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedModel


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
