"""How many chunks each training sample has: the paper's curriculum, or the same samples without an order."""

from __future__ import annotations

import random
from collections.abc import Callable

from refrag.training.curriculum import draw_samples, scaled_table


def curriculum_schedule(samples: int, max_chunks: int, *, seed: int) -> Callable[[int], int]:
    """Return a function from a sample's number to its chunks.

    Parameters
    ----------
    samples : int
        Samples of the whole run, over which the nine stages are scaled.
    max_chunks : int
        The longest samples.
    seed : int

    Examples
    --------
    >>> schedule = curriculum_schedule(1000, 8, seed=0)
    >>> sum(schedule(i) for i in range(100)) < sum(schedule(i) for i in range(900, 1000))
    True
    """
    return _schedule(_lengths(samples, max_chunks, seed))


def shuffled_schedule(samples: int, max_chunks: int, *, seed: int) -> Callable[[int], int]:
    """Return ``curriculum_schedule``'s lengths in a random order: its ablation."""
    lengths = _lengths(samples, max_chunks, seed)
    random.Random(seed).shuffle(lengths)
    return _schedule(lengths)


def constant_schedule(max_chunks: int) -> Callable[[int], int]:
    """Return the schedule in which each sample has as many chunks."""
    return lambda index: max_chunks


def _lengths(samples: int, max_chunks: int, seed: int) -> list[int]:
    return [chunks for _, chunks in draw_samples(scaled_table(samples, max_chunks=max_chunks), seed=seed)]


def _schedule(lengths: list[int]) -> Callable[[int], int]:
    # Rounding makes the table a few samples shorter or longer than asked for.
    return lambda index: lengths[min(index, len(lengths) - 1)]
