"""The demo of ``refrag demo``, the drawings of ``refrag report``, and what the commands print about prompts."""
