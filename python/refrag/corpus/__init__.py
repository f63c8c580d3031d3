"""Builds training text and questions from Debian's documentation and dictionary packages."""

from refrag import deprecated

__getattr__ = deprecated.moved(__name__, "refrag.demo.corpus")
