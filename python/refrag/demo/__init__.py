"""``refrag demo``, the drawings of ``refrag report``, and the information that the commands print about prompts."""

from refrag import deprecated

__getattr__ = deprecated.moved(__name__, "refrag.demo.demo")
