"""Runs the encoder's feed-forward layers as one fused op: the two linear layers of ``project_chunks``."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers.models.bert.modeling_bert import BertIntermediate, BertLayer, BertOutput

import refrag_kernels as rk

# transformers' activation names -> the op's.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def fuse_feed_forward(encoder: nn.Module) -> int:
    """Make the layers of a BERT-like encoder compute their feed-forward part with ``project_chunks``.

    A layer keeps its weights, its dropout and its normalisation. If its linear layers are replaced later (adapters,
    quantised weights), it falls back to transformers' own code. Other encoders are unchanged.

    Parameters
    ----------
    encoder : nn.Module
        Changed in place.

    Returns
    -------
    int
        Number of layers changed.

    Examples
    --------
    >>> from transformers import BertConfig, BertModel
    >>> small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
    >>> fuse_feed_forward(BertModel(BertConfig(**small)))
    2
    """
    config = getattr(encoder, "config", None)
    activation = _ACTIVATIONS.get(getattr(config, "hidden_act", ""))
    if activation is None:
        return 0
    changed = 0
    layer: Any
    for layer in encoder.modules():
        if hasattr(layer, "feed_forward_chunk") and _is_fusible(layer):
            layer.refrag_activation = activation
            # A partial, not a closure or a bound method: a copied or unpickled layer then uses its own weights.
            layer.feed_forward_chunk = functools.partial(_feed_forward, layer)
            changed += 1
    return changed


def _is_fusible(layer: nn.Module) -> bool:
    """Return whether the layer computes dense, activation, dense, dropout, and the norm of the residual sum."""
    first = getattr(getattr(layer, "intermediate", None), "dense", None)
    output = getattr(layer, "output", None)
    parts = (
        first,
        getattr(output, "dense", None),
        getattr(output, "dropout", None),
        getattr(output, "LayerNorm", None),
    )
    kinds = (nn.Linear, nn.Linear, nn.Dropout, nn.LayerNorm)
    return all(type(part) is kind for part, kind in zip(parts, kinds)) and all(
        _same_code(getattr(type(own), name, None), getattr(of_bert, name))
        for own, of_bert, name in (
            (layer, BertLayer, "feed_forward_chunk"),
            (layer.intermediate, BertIntermediate, "forward"),
            (output, BertOutput, "forward"),
        )
    )


def _same_code(function: Any, other: Any) -> bool:
    """Return whether two functions have the same bytecode: families copy BERT's layers, but X-MOD adds adapters."""
    code, wanted = getattr(function, "__code__", None), other.__code__
    return code is not None and all(
        getattr(code, part) == getattr(wanted, part) for part in ("co_code", "co_names", "co_consts")
    )


def _feed_forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    if not _is_fusible(self):
        return type(self).feed_forward_chunk(self, hidden)
    first, second = self.intermediate.dense, self.output.dense
    rows = hidden.reshape(-1, hidden.shape[-1])
    projected = rk.project_chunks(
        rows, first.weight, first.bias, second.weight, second.bias, activation=self.refrag_activation
    )
    return self.output.LayerNorm(self.output.dropout(projected).view(hidden.shape) + hidden)
