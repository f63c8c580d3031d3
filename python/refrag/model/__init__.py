"""The model: an encoder whose chunk embeddings stand among a decoder's tokens, and what it reads."""

from refrag import deprecated

__getattr__ = deprecated.moved(__name__, "refrag.model.modeling")
