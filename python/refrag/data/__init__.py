"""Input texts: sources of passages, training documents, and chunkers, which split passages into chunks."""
