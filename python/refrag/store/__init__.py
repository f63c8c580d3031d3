"""The store: chunk embeddings on disk, found by what they were made of."""

from refrag import deprecated

__getattr__ = deprecated.moved(__name__, "refrag.store.store")
