"""How paged_attention reads the keys of one row a sequence, and how to choose otherwise for comparisons."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple


class Decode(NamedTuple):
    """A way to decode.

    Attributes
    ----------
    ahead : bool
        A step of keys loads the page ids of the next one. Where it loads its own, its keys wait for them, and what
        Triton keeps of the stages is one buffer that is filled while nothing is computed.
    by_length : bool
        Each sequence's own keys are divided evenly among its parts; else the keys that the page table has room for.
    num_stages : int or None
        Stages of the loop over keys; None: as many as ``configs.paged`` says.
    """

    ahead: bool = True
    by_length: bool = True
    num_stages: int | None = None


chosen = Decode()


@contextlib.contextmanager
def use(decode: Decode) -> Iterator[None]:
    """Decode by ``decode`` in every call inside the block."""
    global chosen
    before, chosen = chosen, decode
    try:
        yield
    finally:
        chosen = before
