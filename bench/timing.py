"""Timing of calls against each other: in turns, in one process, so that a busy machine slows all of them alike."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


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
    cuda = torch.cuda.is_initialized()
    for number in range(warm_up + rounds):
        for name, call in calls.items():
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize()
            elapsed = time.perf_counter() - start
            if number >= warm_up:
                seconds[name].append(elapsed)
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the most memory that torch had allocated during ``call``, beyond what was there before, in bytes."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    held = peak = 0
    for _, change in sorted((event.start_ns(), event.nbytes()) for event in events):
        held += change
        peak = max(peak, held)
    return peak


def cpu_pressure() -> float | None:
    """Return the percentage of the last 10 s in which some task waited for a CPU; None where Linux doesn't tell."""
    try:
        return float(Path("/proc/pressure/cpu").read_text().split()[1].removeprefix("avg10="))
    except OSError:
        return None
