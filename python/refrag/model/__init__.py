"""The model: a chunk encoder, a projector, and a decoder whose input mixes tokens and chunk embeddings."""

from refrag import deprecated

__getattr__ = deprecated.moved(__name__, "refrag.model.modeling")
