"""``refrag demo``, the drawings of ``refrag report``, and what the commands print about prompts."""

from refrag import deprecated

__getattr__ = deprecated.moved(__name__, "refrag.demo.demo")
