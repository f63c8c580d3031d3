"""Training: the stages of the paper's recipe, its curriculum, and distillation."""

from refrag.training.schedules import PAPER_TABLE, draw_samples, scaled_table

__all__ = ["PAPER_TABLE", "draw_samples", "scaled_table"]
