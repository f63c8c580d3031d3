"""Finds passages for a question."""

from refrag import deprecated

__getattr__ = deprecated.moved(__name__, "refrag.retrieval.retriever")
