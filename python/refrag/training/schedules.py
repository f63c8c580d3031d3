"""Schedules of the number of chunks per training sample: the paper's curriculum (REFRAG, table 8), and ablations.

The curriculum progresses from single chunks to many over nine stages.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping

STAGES = 9

_MANY_CHUNKS = (1, 3, 9, 25, 73, 212, 618, 1802, 5259)

# Chunks per sample -> number of samples in each stage.
PAPER_TABLE: dict[int, tuple[int, ...]] = {
    1: (1333, 445, 148, 49, 16, 6, 2, 1, 0),
    2: (333, 298, 267, 238, 213, 191, 171, 153, 137),
    4: (83, 102, 126, 156, 193, 238, 293, 362, 447),
    8: (20, 35, 61, 106, 185, 324, 565, 985, 1719),
    16: (5, 11, 23, 48, 103, 220, 468, 997, 2125),
    32: (1, 3, 7, 19, 50, 133, 353, 939, 2496),
    64: _MANY_CHUNKS,
    128: _MANY_CHUNKS,
    256: _MANY_CHUNKS,
}

# Chunks -> the row's nominal sum, and the ratio of consecutive stages. The paper states no ratios; these reproduce its
# rows after rounding.
_ROWS: dict[int, tuple[int, float]] = {
    1: (2000, 0.33355),
    2: (2000, 0.8945),
    4: (2000, 1.2342),
    8: (4000, 1.7450),
    16: (4000, 2.1306),
    32: (4000, 2.6589),
    64: (8000, 2.9180),
    128: (8000, 2.9180),
    256: (8000, 2.9180),
}


def scaled_table(samples: int, *, max_chunks: int = 256) -> dict[int, tuple[int, ...]]:
    """Scale the curriculum to a number of samples with the paper's rule: each row is a geometric sequence.

    A row with nominal sum N and ratio r has ``N (r - 1) / (r^9 - 1) r^i`` samples in stage i = 0..8, rounded; N keeps
    its share of the total. As in the paper, rounding makes the sum differ from ``samples`` by a few.

    Parameters
    ----------
    samples : int
        Total number of samples, 1 or more. The paper has 42,000.
    max_chunks : int
        Omit rows with more chunks than this; the other rows grow accordingly.

    Returns
    -------
    dict of int to tuple of int
        As ``PAPER_TABLE``.

    Raises
    ------
    ValueError
        If ``samples`` or ``max_chunks`` is below 1, or ``samples`` is so small that all rows round to 0.

    Examples
    --------
    >>> scaled_table(42_000) == PAPER_TABLE
    True
    >>> scaled_table(400, max_chunks=2)
    {1: (133, 44, 15, 5, 2, 1, 0, 0, 0), 2: (33, 30, 27, 24, 21, 19, 17, 15, 14)}
    """
    for name, value in (("samples", samples), ("max_chunks", max_chunks)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: got {value!r}, needs an integer of 1 or more")
    rows = {chunks: row for chunks, row in _ROWS.items() if chunks <= max_chunks}
    scale = samples / sum(nominal for nominal, _ in rows.values())
    table = {chunks: _geometric(nominal * scale, ratio) for chunks, (nominal, ratio) in rows.items()}
    if not any(map(sum, table.values())):
        raise ValueError(f"samples: got {samples}, needs more: every stage of every row rounds to 0")
    return table


def draw_samples(table: Mapping[int, tuple[int, ...]], *, seed: int) -> Iterator[tuple[int, int]]:
    """Yield every sample of a table as (stage, chunks): stages in order, samples of a stage shuffled with ``seed``.

    Examples
    --------
    >>> list(draw_samples({1: (2, 0), 4: (0, 1)}, seed=0))
    [(0, 1), (0, 1), (1, 4)]
    """
    generator = random.Random(seed)
    for stage in range(max(map(len, table.values()), default=0)):
        samples = [chunks for chunks, row in table.items() for _ in range(row[stage])]
        generator.shuffle(samples)
        yield from ((stage, chunks) for chunks in samples)


def curriculum_schedule(samples: int, max_chunks: int, *, seed: int) -> Callable[[int], int]:
    """Return a function from a sample's index to its number of chunks.

    Parameters
    ----------
    samples : int
        Number of samples in the run, over which the nine stages are scaled.
    max_chunks : int
        Number of chunks in the longest samples.
    seed : int

    Examples
    --------
    >>> schedule = curriculum_schedule(1000, 8, seed=0)
    >>> sum(schedule(i) for i in range(100)) < sum(schedule(i) for i in range(900, 1000))
    True
    """
    return _schedule(_lengths(samples, max_chunks, seed))


def shuffled_schedule(samples: int, max_chunks: int, *, seed: int) -> Callable[[int], int]:
    """Return a schedule with the curriculum's lengths in random order, as an ablation."""
    lengths = _lengths(samples, max_chunks, seed)
    random.Random(seed).shuffle(lengths)
    return _schedule(lengths)


def constant_schedule(max_chunks: int) -> Callable[[int], int]:
    """Return a schedule in which every sample has ``max_chunks`` chunks."""
    return lambda index: max_chunks


def _lengths(samples: int, max_chunks: int, seed: int) -> list[int]:
    return [chunks for _, chunks in draw_samples(scaled_table(samples, max_chunks=max_chunks), seed=seed)]


def _schedule(lengths: list[int]) -> Callable[[int], int]:
    # Because of rounding, the table may have a few samples more or fewer than the run.
    return lambda index: lengths[min(index, len(lengths) - 1)]


def _geometric(total: float, ratio: float) -> tuple[int, ...]:
    first = total * (ratio - 1) / (ratio**STAGES - 1)
    return tuple(math.floor(first * ratio**stage + 0.5) for stage in range(STAGES))
