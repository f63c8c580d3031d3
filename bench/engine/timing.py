"""Time calls round-robin in one process, so that a busy machine slows all of them equally."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds per round: of the call, and on a GPU also from the host's call until the GPU is done."""

    rounds: tuple[float, ...]
    whole: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def least(self) -> float:
        return min(self.rounds)

    @property
    def latency(self) -> float | None:
        """Median time from the host's call until the GPU is done; None for work on the host."""
        return statistics.median(self.whole) if self.whole else None

    def quantile(self, share: float) -> float:
        return sorted(self.rounds)[round(share * (len(self.rounds) - 1))]


def interleave(
    calls: dict[str, Callable[[], object]], rounds: int, warm_up: int = 2, device: str = "cpu"
) -> dict[str, Times]:
    """Time each call once per round, round-robin, for ``rounds`` rounds after ``warm_up`` untimed rounds."""
    clock = host_seconds if device == "cpu" else EventClock()
    seconds: dict[str, list[tuple[float, ...]]] = {name: [] for name in calls}
    for number in range(warm_up + rounds):
        for name, call in calls.items():
            elapsed = clock(call)
            if number >= warm_up:
                seconds[name].append(elapsed)
    return {name: Times(*zip(*values)) for name, values in seconds.items()}


def host_seconds(call: Callable[[], object]) -> tuple[float]:
    """Return the seconds of a call on the CPU."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start,)


def waited(call: Callable[[], object]) -> float:
    """Return the seconds from a call on the host until its GPU work, if any, is done."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else _nothing
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def _nothing() -> None:
    pass


class EventClock:
    """Times a call on the GPU between two CUDA events, with cold caches.

    The GPU overwrites its caches and then waits while the host queues the call, so that the time excludes the host's
    overhead, which a CUDA graph would avoid. Also returns the time from the host's call until the GPU is done.
    """

    _CACHES = 1 << 29  # bytes, twice the 256 MB of an MI300X
    _CLOCK = 2e9  # upper bound of GPU cycles per second

    def __init__(self) -> None:
        self._overwritten = torch.empty(self._CACHES, dtype=torch.uint8, device="cuda")
        self._last: dict[Callable[[], object], tuple[float, float]] = {}  # seconds: host, GPU

    def __call__(self, call: Callable[[], object]) -> tuple[float, float]:
        queueing, took = self._last.get(call, (0.0, 0.0))
        # A long call that leaves the host idle needs no wait, and a single call gives both times.
        alone = took > 0.05 and queueing < 0.5 * took
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if not alone:
            self._overwritten.zero_()
            torch.cuda._sleep(int(self._CLOCK * min(0.1, max(1e-3, 1.5 * queueing))))
        start.record()
        before = time.perf_counter()
        call()
        queueing = time.perf_counter() - before
        end.record()
        end.synchronize()
        latency, took = time.perf_counter() - before, start.elapsed_time(end) / 1e3
        self._last[call] = queueing, took
        if not alone:
            before = time.perf_counter()
            call()
            torch.cuda.synchronize()
            latency = time.perf_counter() - before
        return took, latency


def rotated(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Return a call that rotates through ``calls``, which differ only in their tensors' memory."""
    if len(calls) == 1:
        return calls[0]
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def peak_bytes(call: Callable[[], object]) -> int:
    """Return torch's peak memory allocated during ``call`` above what was allocated before, in bytes."""
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
    """Return the percentage of the last 10 s in which some task waited for a CPU; None if unavailable."""
    try:
        return float(Path("/proc/pressure/cpu").read_text().split()[1].removeprefix("avg10="))
    except OSError:
        return None
