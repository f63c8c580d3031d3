"""Token files: documents as uint16 tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def load_tokens(paths: Sequence[Path]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return tokens uint16 [N], offsets int64 [D + 1] and the sources (stand-in: .npz with t, o)."""
    tokens, offsets, sources, total = [], [np.zeros(1, np.int64)], [], 0
    for path in paths:
        with np.load(path) as held:
            tokens.append(held["t"].astype(np.uint16))
            offsets.append(held["o"][1:].astype(np.int64) + total)
            total += len(tokens[-1])
        sources.append(str(path))
    return np.concatenate(tokens), np.concatenate(offsets), sources
