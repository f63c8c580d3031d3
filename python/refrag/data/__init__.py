"""Texts as they come: sources of passages, documents to train on, and how passages are cut into chunks."""
