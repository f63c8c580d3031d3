"""How many chunks each training sample has: the paper's curriculum, or the same samples without an order."""

from __future__ import annotations

import random
from collections.abc import Callable

from refrag.training.curriculum import draw_samples, scaled_table


def curriculum_schedule(samples: int, max_chunks: int, *, seed: int, ordered: bool = True) -> Callable[[int], int]:
    """Return a function from a sample's number to its chunks.

    Parameters
    ----------
    samples : int
        Samples of the whole run, over which the nine stages are scaled.
    max_chunks : int
        The longest samples.
    seed : int
    ordered : bool
        Whether the stages come in their order; False is the ablation, the same lengths shuffled.

    Examples
    --------
    >>> schedule = curriculum_schedule(1000, 8, seed=0)
    >>> sum(schedule(i) for i in range(100)) < sum(schedule(i) for i in range(900, 1000))
    True
    """
    drawn = [chunks for _, chunks in draw_samples(scaled_table(samples, max_chunks=max_chunks), seed=seed)]
    if not ordered:
        random.Random(seed).shuffle(drawn)
    # Rounding makes the table a few samples shorter or longer than asked for.
    return lambda index: drawn[min(index, len(drawn) - 1)]


def constant_schedule(chunks: int) -> Callable[[int], int]:
    """Return the schedule in which each sample has as many chunks."""
    return lambda index: chunks
