"""The store: chunk embeddings on disk, keyed by the content that they were computed from."""

from refrag import deprecated

__getattr__ = deprecated.moved(__name__, "refrag.store.store")
