"""Computes how much to take from each source."""

from __future__ import annotations

from collections.abc import Sequence


def even_level(sizes: Sequence[int], total: int, *, what: str = "tokens: got {}, the sources have {} in total") -> int:
    """Return the level for which the sum of ``min(size, level)`` over all sources is ``total``, up to rounding.

    Parameters
    ----------
    sizes : sequence of int
    total : int
    what : str
        Format of the error message, with places for ``total`` and the sum of all sizes.

    Raises
    ------
    ValueError
        If the sources have less than ``total`` in total.

    Examples
    --------
    >>> even_level([10, 100, 1000], 130)
    60
    """
    if total > sum(sizes):
        raise ValueError(what.format(f"{total:,}", f"{sum(sizes):,}"))
    left = total
    ordered = sorted(sizes)
    for index, size in enumerate(ordered):
        level = left // (len(ordered) - index)
        if size >= level:
            return level
        left -= size
    return ordered[-1] if ordered else 0


def capped_level(sizes: Sequence[int], cap: float) -> int:
    """Return the highest level for which no source exceeds a fraction ``cap`` of the sum of ``min(size, level)``.

    Raises
    ------
    ValueError
        If ``cap`` is not a fraction, or there are too few sources for it.

    Examples
    --------
    >>> capped_level([10, 10, 10, 10, 1000], 0.25)  # 13 is a quarter of 53
    13
    """
    if not 0 < cap <= 1:
        raise ValueError(f"cap: got {cap}, needs a fraction above 0 and up to 1")
    ordered = sorted(sizes)
    for taken in range(len(ordered), 0, -1):
        # The first `taken` sources are used whole, the others up to the level: level = cap * (whole + others * level).
        whole, others = sum(ordered[:taken]), len(ordered) - taken
        if not others:
            if ordered[-1] <= cap * whole:
                return ordered[-1]
            continue
        if cap * others < 1:
            level = int(cap * whole / (1 - cap * others))
            if ordered[taken - 1] <= level:
                return level
    raise ValueError(f"cap: got {cap} with {len(sizes)} sources, needs more sources of similar size")
