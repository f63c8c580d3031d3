"""Nsight Compute: the counters to collect, and parsing of its CSV output per launch."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence

# Whole sections: ncu selects the counters that the chip has, whatever their names.
_SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "WarpStateStats",
    "Occupancy",
    "LaunchStats",
)
_METRICS = (
    "gpu__time_duration.sum",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "lts__t_sectors_op_read.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "l1tex__data_bank_conflicts_pipe_lsu.sum",
)
_SECTOR = 32  # bytes per L2 sector
_STALL = re.compile(r"smsp__average_warps?_issue_stalled_(\w+?)(?:_not_issued)?_per_issue_active\.ratio")


def command(ncu: str, log: str, words: Sequence[str], metrics: bool = True) -> list[str]:
    """Return the command that profiles a program's launches between the profiler's start and stop.

    It leaves the clocks alone, so no machine setting changes.
    """
    options = [ncu, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none", "--log-file", log]
    options += ["--profile-from-start", "off", "--target-processes", "all"]
    options += [word for section in _SECTIONS for word in ("--section", section)]
    options += ["--metrics", ",".join(_METRICS)] if metrics else []
    return [*options, *words]


def launches(text: str) -> list[dict[str, float | str]]:
    """Return the counters of each launch in the log of ``command``: ncu's names, with values in base units."""
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    records = list(csv.DictReader(lines[start:]))
    # The line below the header holds the units.
    return [{name: _number(value) for name, value in record.items() if value} for record in records if record["ID"]]


def errors(text: str) -> str:
    """Return ncu's error messages."""
    return " ".join(line.removeprefix("==ERROR== ") for line in text.splitlines() if line.startswith("==ERROR=="))[:500]


def summary(launch: dict[str, float | str]) -> dict[str, object]:
    """Summarize where a kernel's time goes.

    Returns
    -------
    dict
        ``kernel``; ``gpu_time_s``; ``tensor_active``, the percentage of cycles in which tensor cores are active;
        ``l2_read_bytes_per_s``, ``dram_bytes_per_s``, ``dram_bytes``; ``occupancy``, active warps as a percentage of
        the maximum; ``registers``; ``shared_bytes``, per CTA; ``waves``; ``blocks_per_sm``; ``stalls``, the warps
        stalled per issue for the five most frequent reasons. Counters that ncu didn't report are None.
    """
    seconds = _first(launch, r"gpu__time_duration\.sum")
    seconds = None if seconds is None else seconds / 1e9
    dram = [_first(launch, rf"dram__bytes_{way}\.sum") for way in ("read", "write")]
    moved = sum(value for value in dram if value is not None) if any(value is not None for value in dram) else None
    sectors = _first(launch, r"lts__t_sectors_op_read\.sum")
    stalls = {match.group(1): value for name, value in launch.items() if (match := _STALL.fullmatch(name))}
    worst = sorted(((n, v) for n, v in stalls.items() if isinstance(v, float)), key=lambda item: -item[1])[:5]

    def rate(amount: float | None) -> float | None:
        return amount / seconds if amount is not None and seconds else None

    return {
        "kernel": str(launch.get("Kernel Name", "")),
        "gpu_time_s": seconds,
        "tensor_active": _first(launch, r"sm__pipe_tensor\w*_cycles_active\.avg\.pct_of_peak_sustained_active"),
        "l2_read_bytes_per_s": rate(None if sectors is None else _SECTOR * sectors),
        "dram_bytes_per_s": rate(moved),
        "dram_bytes": moved,
        "occupancy": _first(launch, r"sm__warps_active\.avg\.pct_of_peak_sustained_active"),
        "registers": _first(launch, r"launch__registers_per_thread"),
        "shared_bytes": _first(launch, r"launch__shared_mem_per_block"),
        "waves": _first(launch, r"launch__waves_per_multiprocessor"),
        "issue_active": _first(launch, r"sm(sp)?__issue_active\.avg\.pct_of_peak_sustained_active"),
        "stalls": dict(worst),
    }


def _first(launch: dict[str, float | str], pattern: str) -> float | None:
    values = (value for name, value in launch.items() if re.fullmatch(pattern, name))
    return next((value for value in values if isinstance(value, float)), None)


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text
