"""Training: the curriculum of the paper."""

from refrag.training.schedules import PAPER_TABLE, draw_samples, scaled_table

__all__ = ["PAPER_TABLE", "draw_samples", "scaled_table"]
