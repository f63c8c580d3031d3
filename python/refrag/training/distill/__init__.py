"""Distillation: a decoder that reads the text teaches the model to predict the same from slots."""

from refrag.training.distill.options import DistillOptions

__all__ = ["DistillOptions"]
