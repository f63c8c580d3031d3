"""Measure a row: check each contender against float64, then time them round-robin."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
from collections.abc import Callable, Container, Sequence

import torch

import refrag_kernels as rk
from bench.engine import limits
from bench.engine.case import OURS as OURS
from bench.engine.case import Call, Case, Entry, Goal, Skip, error_of
from bench.engine.timing import Times, cpu_pressure, interleave, peak_bytes, rotated, waited

_PLANS = 5  # how often a plan is timed


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Outcome of a measured row. ``times`` excludes contenders that were wrong or can't run here."""

    entry: Entry
    case: Case | None
    ours: tuple[str, ...]
    times: dict[str, Times]
    errors: dict[str, float]
    wrong: dict[str, float]
    skipped: dict[str, str]
    peaks: dict[str, int]
    matmul: float | None = None
    bandwidth: float | None = None
    pressure: float | None = None
    goal: Goal = Goal()
    device: str = "cpu"
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    plans: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def limit(self) -> str | None:
        """The machine limit that bounds the row."""
        binds = self.case.limit if self.case else None
        return limits.BANDWIDTH[self.device] if binds == "read" else binds

    @property
    def contenders(self) -> list[str]:
        """All contenders: refrag_kernels first, then the peers."""
        names = dict.fromkeys([*self.ours, *self.times, *self.wrong, *self.skipped, *self.failed])
        return list(names)

    @property
    def best_peer(self) -> str | None:
        peers = [name for name in self.times if name not in self.ours]
        return min(peers, key=lambda name: self.times[name].median, default=None)

    def speed_up(self, name: str = OURS) -> float | None:
        """Return the speed-up over the best peer, by medians."""
        if name not in self.times or self.best_peer is None:
            return None
        return self.times[self.best_peer].median / self.times[name].median

    def flops(self, name: str = OURS) -> float | None:
        """Return the throughput of useful work, in FLOP/s."""
        known = name in self.times and self.case is not None and self.case.flops
        return self.case.flops / self.times[name].median if known else None  # type: ignore[union-attr]

    def bytes(self, name: str = OURS) -> float | None:
        """Return the bandwidth of the required memory traffic, in bytes/s."""
        known = name in self.times and self.case is not None and self.case.bytes
        return self.case.bytes / self.times[name].median if known else None  # type: ignore[union-attr]

    def share(self, name: str = OURS) -> float | None:
        """Return the useful work or traffic as a fraction of the limiting rate, measured in the same run."""
        flops, traffic = self.flops(name), self.bytes(name)
        if traffic and self.bandwidth:
            return traffic / self.bandwidth
        return flops / self.matmul if flops and self.matmul else None

    def misses(self) -> list[str]:
        """Return the goals that the row misses."""
        missed = []
        for what, wanted, got in (
            ("against the best peer", self.goal.against_peers, self.speed_up()),
            ("share of the matmul rate", self.goal.share_of_matmul, self.share()),
            ("share of the read rate", self.goal.share_of_bandwidth, self.share()),
        ):
            if wanted is not None and (got is None or got < wanted):
                missed.append(f"{what}: {'none' if got is None else f'{got:.2f}'}, goal {wanted:.2f}")
        return missed


def measure(
    entry: Entry,
    rounds: int,
    *,
    backends: Sequence[str] = (),
    refcheck: bool = True,
    memory: bool = True,
    device: str = "cpu",
    goal: Goal | None = None,
    with_peers: bool = True,
    copies: int = 1,
) -> Outcome:
    """Check and time one row.

    An error in a peer skips that peer; an error in refrag_kernels is raised.

    Parameters
    ----------
    entry : Entry
    rounds : int
        Timed rounds.
    backends : sequence of str
        Time refrag_kernels on each of these, instead of on the default backend.
    refcheck : bool
        Whether to check results against float64 first.
    memory : bool
        Whether to call each contender once more and measure its peak memory.
    device : {"cpu", "cuda"}
        Device of the row's tensors, which selects the clock and the limits.
    goal : Goal, optional
    with_peers : bool
        Whether the peers are timed too.
    copies : int
        Number of copies of the row's tensors that calls rotate through.
    """
    goal = goal or Goal()
    names = tuple(f"{OURS}, {backend}" for backend in backends) or (OURS,)
    try:
        case = entry.build()
    except Skip as reason:
        return Outcome(entry, None, names, {}, {}, {}, dict.fromkeys(names, str(reason)), {}, goal=goal)
    device = "cpu" if case.on_host else device
    calls = _ours(case, names, backends)
    ours = tuple(calls)
    calls |= case.peers if with_peers else {}
    errors: dict[str, float] = {}
    wrong: dict[str, float] = {}
    skipped: dict[str, str] = {}
    with torch.enable_grad() if case.grad else torch.no_grad():
        expected = case.expected() if refcheck and case.expected else None
        theirs = case.peer_expected() if refcheck and with_peers and case.peer_expected else expected
        for name, call in list(calls.items()):
            # The looser bound excludes peers that are wrong, not those that are merely less accurate.
            wanted, bound = (expected, case.bound) if name in ours else (theirs, 10 * case.bound)
            try:
                result = call()
                if wanted is not None:
                    errors[name] = error_of(result, wanted)
                    if errors[name] > bound:
                        wrong[name] = errors[name]
            except Skip as reason:
                skipped[name] = str(reason)
            except Exception as error:
                if name in ours and "no allowed backend" not in str(error):
                    raise
                skipped[name] = str(error) if name in ours else f"{type(error).__name__}: {_first_line(error)}"
            if name in wrong or name in skipped:
                del calls[name]
        del expected, theirs
        gc.collect()
        turns = [calls]
        for _ in range(1, min(copies, case.max_copies)):
            copy = entry.build()
            turns.append(_ours(copy, names, backends) | copy.peers)
        calls = {name: rotated([turn[name] for turn in turns]) for name in calls}
        few = case.max_rounds < rounds
        # A copy's first call may compile.
        warm_up = max(1 if few else 2, len(turns))
        times = interleave(calls, min(rounds, case.max_rounds), warm_up, device)
        peaks = {name: peak_bytes(call) for name, call in calls.items()} if memory else {}
        plans = _plan_seconds(case, ours, times)
        matmul, bandwidth = _limits(case.limit, entry.dtype, device)
    pressure = cpu_pressure()
    return Outcome(
        entry, case, ours, times, errors, wrong, skipped, peaks, matmul, bandwidth, pressure, goal, device, plans=plans
    )


def unmeasured(entry: Entry, *, skipped: str | None = None, failed: BaseException | None = None) -> Outcome:
    """Return the outcome of a row that was skipped, or that failed with an error in refrag_kernels."""
    left_out = {OURS: skipped} if skipped else {}
    errors = {OURS: f"{type(failed).__name__}: {_first_line(failed)}"} if failed else {}
    return Outcome(entry, None, (OURS,), {}, {}, {}, left_out, {}, failed=errors)


def _ours(case: Case, names: Sequence[str], backends: Sequence[str]) -> dict[str, Call]:
    calls: dict[str, Call] = {}
    for name, backend in zip(names, backends or [None]):
        calls[name] = _on_backend(case.ours, backend)
        for variant, call in case.variants.items():
            calls[f"{name}, {variant}"] = _on_backend(call, backend)
    return calls


def _plan_seconds(case: Case, ours: Sequence[str], timed: Container[str]) -> dict[str, float]:
    """Return the seconds to make each contender's plan and copy it to the GPU. All our backends share one plan."""
    seconds = {}
    for name, make in case.plans.items():
        contenders = ours if name == OURS else [name]
        if any(contender in timed for contender in contenders):
            took = statistics.median([waited(make) for _ in range(_PLANS)])
            seconds |= dict.fromkeys(contenders, took)
    return seconds


def _limits(binds: str | None, dtype: torch.dtype, device: str) -> tuple[float | None, float | None]:
    """Return the matmul throughput and the bandwidth; only the limiting one is measured, the other is None."""
    if binds is None:
        return None, None
    wanted = dtype if binds == "matmul" else None
    if device == "cuda":
        rate = limits.of_gpu(wanted)
    else:
        rate = limits.bandwidth() if wanted is None else limits.matmul_flops(wanted)
    return (rate, None) if binds == "matmul" else (None, rate)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]


def _on_backend(call: Call, backend: str | None) -> Callable[[], object]:
    if backend is None:
        return call

    def restricted() -> object:
        with rk.use_backend(backend):
            return call()

    return restricted


@contextlib.contextmanager
def threads(count: int):
    """Run with ``count`` torch threads; 0 leaves the number unchanged."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
