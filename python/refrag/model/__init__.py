"""The model: a chunk encoder, a projector, and a decoder that reads chunk embeddings between its tokens."""

from refrag import deprecated

__getattr__ = deprecated.moved(__name__, "refrag.model.modeling")
