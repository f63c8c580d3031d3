"""Kernels for compressed retrieval-augmented decoding: torch ops over mixed sequences of text and chunk embeddings."""

from refrag_kernels.backends import use_backend

__all__ = ["use_backend"]
