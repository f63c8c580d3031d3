"""Text and questions to train on, made from Debian's packages of documentation and dictionaries."""

from refrag import deprecated

__getattr__ = deprecated.moved(__name__, "refrag.demo.corpus")
