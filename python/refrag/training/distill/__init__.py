"""Distillation: the model learns to predict from slots what the decoder predicts from the full text."""

from refrag.training.distill.options import DistillOptions

__all__ = ["DistillOptions"]
