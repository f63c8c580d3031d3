"""Distillation: slots that hold their chunks' meaning, taught by the decoder that reads the text itself."""

from refrag.training.distill.options import DistillOptions

__all__ = ["DistillOptions"]
