"""The order in which the programs of a tile kernel start.

A GPU starts programs by their numbers. Each takes a tile of rows and a column: some query heads of one key/value head.
A tile that attends to many keys does so for every head, so if a column started last with all its tiles, the device
would wait for its longest tile. Instead, columns are numbered before tiles: the first tiles of all columns, enough to
fill the device, then one section of key/value heads after the other. The keys and values of a section fit in the L2
cache, where its tiles share them. The order doesn't change results.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

# Programs that fill 132 multiprocessors (H100) twice.
_PROGRAMS = 264
# Bytes of the H100's L2 cache; taken where there is no device to ask.
_L2_BYTES = 50 << 20


class Order(NamedTuple):
    """An order of programs.

    Attributes
    ----------
    section : int
        Key/value heads whose programs go together; 0: each column has all its tiles before the next column starts.
    ahead : int
        Programs that go before the first section, over all heads.
    """

    section: int
    ahead: int

    def columns(self, columns: int, kv_heads: int) -> tuple[int, int]:
        """Return a section's columns, and the tiles of all columns that go before the first section."""
        return max(1, self.section * columns // kv_heads), -(-self.ahead // columns)


TILES_FIRST = Order(0, 0)

_forced: Order | None = None


@contextlib.contextmanager
def use(order: Order) -> Iterator[None]:
    """Number the programs of every launch inside the block by ``order``, for comparisons."""
    global _forced
    before, _forced = _forced, order
    try:
        yield
    finally:
        _forced = before


def heads_first() -> bool:
    """Return whether heads come before tiles where a kernel has no sections."""
    return _forced != TILES_FIRST


@functools.cache
def _l2_bytes(index: int) -> int:
    # Some of torch's builds for ROCm don't know it.
    return getattr(torch.cuda.get_device_properties(index), "L2_cache_size", 0) or _L2_BYTES


def order_of(k: torch.Tensor) -> Order:
    """Return the order for attention to keys ``k`` [T_kv, H_kv, D], and values like them.

    The keys and values of a section take up to half of the L2 cache, as the next section may have begun. Sections
    are of equal size as far as possible: a last one of few heads would leave most of the device idle.
    """
    if _forced is not None:
        return _forced
    rows, heads, width = k.shape
    if k.is_cuda:
        cache = _l2_bytes(torch.cuda.current_device() if k.device.index is None else k.device.index)
    else:
        cache = _L2_BYTES
    most = min(heads, max(1, cache // 2 // max(1, 2 * rows * width * k.element_size())))
    return Order(-(-heads // -(-heads // most)), _PROGRAMS)
