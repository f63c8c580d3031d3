"""How paged_attention reads keys when decoding (one row per sequence), with alternatives for comparisons."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple


class Decode(NamedTuple):
    """Options of the decoding kernel.

    Attributes
    ----------
    ahead : bool
        Each step prefetches the page ids of the next one. Otherwise its keys wait for its own page ids, and Triton's
        pipeline degenerates to a single buffer that is filled while nothing is computed.
    by_length : bool
        Divide each sequence's own keys evenly among the splits, rather than the rows that the page table has room for.
    num_stages : int or None
        Stages of the loop over keys; None: those of ``configs.paged``.
    """

    ahead: bool = True
    by_length: bool = True
    num_stages: int | None = None


chosen = Decode()


@contextlib.contextmanager
def use(decode: Decode) -> Iterator[None]:
    """Use these options in every call inside the block."""
    global chosen
    before, chosen = chosen, decode
    try:
        yield
    finally:
        chosen = before
