"""The store: chunk embeddings on disk, found by what they were made of."""
