"""Finding 16-byte keys: sorted arrays, 24 bytes a key, where a dict of Python objects would take five times as much."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

KEY_BYTES = 16


class KeyIndex:
    """The places of keys; it doesn't change, ``extended`` makes a new one.

    Keys are digests, so that their first 8 bytes nearly always decide; the other 8 are compared afterwards.

    Examples
    --------
    >>> index = KeyIndex().extended([np.frombuffer(b"a" * 16 + b"b" * 16, np.uint8).reshape(2, 16)])
    >>> index.find(b"b" * 16 + b"c" * 16)
    array([ 1, -1])
    """

    def __init__(self) -> None:
        self._first = np.zeros(0, np.uint64)  # sorted
        self._second = np.zeros(0, np.uint64)
        self._place = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self._place)

    def extended(self, keys: Sequence[np.ndarray]) -> KeyIndex:
        """Return an index that also has ``keys``, uint8 [n, 16] each; their places go on from those it has."""
        halves = np.concatenate([np.zeros((0, 2), np.uint64), *(_halves(part.tobytes()) for part in keys)])
        if not len(halves):
            return self
        # Stable, and inserted to the right: of equal keys the one that came last stands last.
        order = np.argsort(halves[:, 0], kind="stable")
        at = np.searchsorted(self._first, halves[order, 0], side="right")
        larger = KeyIndex()
        larger._first = np.insert(self._first, at, halves[order, 0])
        larger._second = np.insert(self._second, at, halves[order, 1])
        larger._place = np.insert(self._place, at, len(self) + order)
        return larger

    def find(self, keys: bytes) -> np.ndarray:
        """Return the place of each key, int64 [n], -1 where there is none; of equal keys, the last one's."""
        wanted = _halves(keys)
        if not len(self):
            return np.full(len(wanted), -1)
        # A key below all others gets -1 here, the last entry, whose bytes are not its own either.
        at = np.searchsorted(self._first, wanted[:, 0], side="right") - 1
        found = (self._first[at] == wanted[:, 0]) & (self._second[at] == wanted[:, 1])
        places = np.where(found, self._place[at], -1)
        for missed in np.flatnonzero(~found):
            i = at[missed]
            while i >= 0 and self._first[i] == wanted[missed, 0]:  # only the first 8 bytes are alike
                if self._second[i] == wanted[missed, 1]:
                    places[missed] = self._place[i]
                    break
                i -= 1
        return places


def _halves(keys: bytes) -> np.ndarray:
    return np.frombuffer(keys, np.uint64).reshape(-1, 2)
