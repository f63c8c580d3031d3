"""Run cases: check each contender against float64, then time all of them in turns."""

from __future__ import annotations

import dataclasses

import torch

from bench.case import Case, error_of
from bench.limits import matmul_flops, read_bytes
from bench.timing import Times, cpu_pressure, interleave

OURS = "refrag_kernels"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A case, measured. ``times`` lacks contenders whose result was wrong: ``wrong`` has their errors."""

    case: Case
    times: dict[str, Times]
    wrong: dict[str, float]
    matmul: float | None
    bandwidth: float | None
    pressure: float | None

    @property
    def best_peer(self) -> str | None:
        peers = [name for name in self.times if name != OURS]
        return min(peers, key=lambda name: self.times[name].median, default=None)

    def speed_up(self) -> float | None:
        """Return how many times faster than the best peer, by medians."""
        if OURS not in self.times or self.best_peer is None:
            return None
        return self.times[self.best_peer].median / self.times[OURS].median

    def share(self) -> float | None:
        """Return the useful work or traffic as a share of the machine's limit, measured in the same run."""
        if OURS not in self.times:
            return None
        seconds = self.times[OURS].median
        if self.case.bytes and self.bandwidth:
            return self.case.bytes / seconds / self.bandwidth
        return self.case.flops / seconds / self.matmul if self.case.flops and self.matmul else None

    def misses(self) -> list[str]:
        """Return which of the case's goals are not reached."""
        goal, missed = self.case.goal, []
        for what, wanted, got in (
            ("against the best peer", goal.against_peers, self.speed_up()),
            ("share of the matmul rate", goal.share_of_matmul, self.share()),
            ("share of the read rate", goal.share_of_bandwidth, self.share()),
        ):
            if wanted is not None and (got is None or got < wanted):
                missed.append(f"{what}: {'none' if got is None else f'{got:.2f}'}, goal {wanted:.2f}")
        return missed


def measure(case: Case, rounds: int) -> Outcome:
    """Check and time one case."""
    calls = {OURS: case.ours, **case.peers}
    wrong = {}
    with torch.no_grad() if "backward" not in case.name else torch.enable_grad():
        if case.expected is not None:
            expected = case.expected()
            # A peer is only excluded for being wrong, not for being less accurate than our own bound.
            bounds = {name: case.bound if name == OURS else 10 * case.bound for name in calls}
            errors = {name: error_of(call(), expected) for name, call in calls.items()}
            wrong = {name: error for name, error in errors.items() if error > bounds[name]}
        times = interleave({name: call for name, call in calls.items() if name not in wrong}, rounds)
        matmul = matmul_flops(case.dtype) if case.flops and not case.bytes else None
        bandwidth = read_bytes() if case.bytes else None
    return Outcome(case, times, wrong, matmul, bandwidth, cpu_pressure())
