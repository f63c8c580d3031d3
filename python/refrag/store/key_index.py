"""An index of 16-byte keys in sorted arrays: 24 bytes per key, a fifth of what a dict of Python objects takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

KEY_BYTES = 16


class KeyIndex:
    """An immutable index from keys to their positions; ``extended`` returns a new one.

    Keys are digests, so their first 8 bytes are almost always unique; the other 8 are compared afterwards.

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
        """Return an index that also contains ``keys``, arrays uint8 [n, 16]; position numbers continue."""
        halves = np.concatenate([np.zeros((0, 2), np.uint64), *(_halves(part.tobytes()) for part in keys)])
        if not len(halves):
            return self
        # A stable sort, inserted to the right: equal keys stay in the order in which they were added.
        order = np.argsort(halves[:, 0], kind="stable")
        at = np.searchsorted(self._first, halves[order, 0], side="right")
        larger = KeyIndex()
        larger._first = np.insert(self._first, at, halves[order, 0])
        larger._second = np.insert(self._second, at, halves[order, 1])
        larger._place = np.insert(self._place, at, len(self) + order)
        return larger

    def find(self, keys: bytes) -> np.ndarray:
        """Return the position of each key, int64 [n], or -1 if it is absent; of equal keys, the last one's."""
        wanted = _halves(keys)
        if not len(self):
            return np.full(len(wanted), -1)
        # A key below all others gets index -1, the last entry, whose bytes don't match either.
        at = np.searchsorted(self._first, wanted[:, 0], side="right") - 1
        found = (self._first[at] == wanted[:, 0]) & (self._second[at] == wanted[:, 1])
        places = np.where(found, self._place[at], -1)
        for missed in np.flatnonzero(~found):
            i = at[missed]
            while i >= 0 and self._first[i] == wanted[missed, 0]:  # only the first 8 bytes are equal
                if self._second[i] == wanted[missed, 1]:
                    places[missed] = self._place[i]
                    break
                i -= 1
        return places


def _halves(keys: bytes) -> np.ndarray:
    return np.frombuffer(keys, np.uint64).reshape(-1, 2)
