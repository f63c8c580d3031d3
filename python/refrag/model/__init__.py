"""The model: an encoder whose chunk embeddings stand among a decoder's tokens, and what it reads."""
