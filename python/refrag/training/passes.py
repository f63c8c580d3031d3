"""Split a step's samples into forward passes of bounded size, equally many in every process."""

from __future__ import annotations

from collections.abc import Sequence

from refrag.training.samples import Sample


def cut_passes(samples: Sequence[Sample], max_rows: int) -> list[list[Sample]]:
    """Split samples into passes of at most ``max_rows`` rows; a longer sample gets a pass of its own."""
    passes: list[list[Sample]] = []
    rows = 0
    for sample in sorted(samples, key=lambda sample: sample.num_rows):
        if not passes or rows + sample.num_rows > max_rows:
            passes.append([])
            rows = 0
        passes[-1].append(sample)
        rows += sample.num_rows
    return passes


def make_passes(passes: Sequence[list[Sample]], count: int) -> list[list[Sample]]:
    """Return ``count`` passes of the same samples: halve the largest, and add empty ones if that isn't enough.

    With sharded parameters, processes run passes in lockstep, so all need the same number.

    Examples
    --------
    >>> one = Sample(((-1, [1, 2]),), 0)
    >>> [len(part) for part in make_passes([[one] * 3], 5)]
    [1, 1, 1, 0, 0]
    """
    made = list(passes)
    while len(made) < count and max(map(len, made), default=0) > 1:
        largest = max(range(len(made)), key=lambda number: len(made[number]))
        own = made[largest]
        made[largest : largest + 1] = [own[: len(own) // 2], own[len(own) // 2 :]]
    return made + [[]] * (count - len(made))
