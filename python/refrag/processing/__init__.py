"""Turns text and passages into the packed rows of a prompt, and selects the chunks to expand."""
