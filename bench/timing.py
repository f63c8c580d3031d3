"""Timing of calls against each other: in turns, in one process, so that a busy machine slows all of them alike."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of each round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def least(self) -> float:
        return min(self.rounds)

    def quantile(self, share: float) -> float:
        return sorted(self.rounds)[round(share * (len(self.rounds) - 1))]


def interleave(calls: dict[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, Times]:
    """Time each call once a round, in turns, for ``rounds`` rounds after ``warm_up`` that don't count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warm_up + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            if number >= warm_up:
                seconds[name].append(elapsed)
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def cpu_pressure() -> float | None:
    """Return the percentage of the last 10 s in which some task waited for a CPU; None where Linux doesn't tell."""
    try:
        return float(Path("/proc/pressure/cpu").read_text().split()[1].removeprefix("avg10="))
    except OSError:
        return None
