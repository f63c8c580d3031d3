"""Results of a run: one record per row and contender, as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import datetime
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import torch

from bench.engine.limits import BANDWIDTH
from bench.engine.run import Outcome
from refrag_kernels import backends

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[2]


def environment(threads: int, rounds: int, command: str, device: str = "cpu") -> dict[str, Any]:
    """Return the conditions of a run: versions, machine, commit, date, command."""
    report = backends.report()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "command": command,
        "versions": report.versions,
        "machine": report.machine,
        "devices": report.devices,
        "device": device,
        "build": report.build,
        "threads": threads or torch.get_num_threads(),
        "rounds": rounds,
    }


def commit() -> str:
    """Return the checkout's commit, with "-dirty" if files differ from it; empty outside a checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except OSError:
        return ""


def records(outcome: Outcome) -> list[dict[str, Any]]:
    """Return a record for each contender of a row. A wrong or skipped contender has no time."""
    entry = outcome.entry
    found = []
    for name in outcome.contenders:
        times, ours = outcome.times.get(name), name in outcome.ours
        states = {"wrong": outcome.wrong, "skipped": outcome.skipped, "failed": outcome.failed}
        status = next((state for state, names in states.items() if name in names), "ok")
        found.append(
            {
                "row": entry.name,
                "op": entry.op,
                "case": entry.case,
                "preset": entry.preset,
                "dtype": entry.dtype_name,
                "parameters": entry.parameters,
                "contender": name,
                "ours": ours,
                "status": status,
                "reason": outcome.skipped.get(name) or outcome.failed.get(name),
                "error": outcome.errors.get(name),
                "median_s": times and times.median,
                "p20_s": times and times.quantile(0.2),
                "p80_s": times and times.quantile(0.8),
                "min_s": times and times.least,
                "latency_s": times and times.latency,
                "plan_s": outcome.plans.get(name),
                "rounds": times and len(times.rounds),
                "gflops": _scaled(outcome.flops(name)),
                "gbytes": _scaled(outcome.bytes(name)),
                "share_of_limit": outcome.share(name),
                "limit": outcome.limit,
                "limit_per_s": outcome.bandwidth or outcome.matmul,
                "speed_up": outcome.speed_up(name) if ours else None,
                "best_peer": outcome.best_peer,
                "peak_bytes": outcome.peaks.get(name),
                "missed": outcome.misses() if ours else [],
                "cpu_pressure": outcome.pressure,
                "notes": outcome.case.notes if outcome.case else "",
                "command": entry.command,
            }
        )
    return found


def _scaled(rate: float | None) -> float | None:
    return None if rate is None else rate / 1e9


def read(path: Path) -> dict[str, Any]:
    """Read a run's JSON.

    Raises
    ------
    ValueError
        If the file is not a run's JSON.
    """
    try:
        run = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(run, dict) or run.get("schema") != SCHEMA:
        raise ValueError(f"{path}: not a run of this benchmark, needs the JSON of `python -m bench run --json`")
    return run


def write_json(path: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write a run, replacing the file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"schema": SCHEMA, "environment": about, "rows": rows}, indent=2) + "\n")
    partial.replace(path)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a run's records, one line each; parameters have columns of their own."""
    parameters = sorted({name for row in rows for name in row["parameters"]})
    flat = [
        {
            **{name: value for name, value in row.items() if name != "parameters"},
            "missed": "; ".join(row["missed"]),
            **row["parameters"],
        }
        for row in rows
    ]
    columns = list(dict.fromkeys([*(name for row in flat for name in row if name not in parameters), *parameters]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.getvalue())


def markdown(run: dict[str, Any]) -> str:
    """Return a run as Markdown tables, one per op."""
    about, rows = run["environment"], run["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    machine = f"{about['machine'].get('cpu', 'an unknown CPU')}, {about['threads']} threads"
    if about.get("device", "cpu") != "cpu":
        gpus = [name for name in about["devices"] if name.startswith(about["device"])]
        machine = f"{', '.join(gpus)}; host {machine}"
    lines = [
        f"Measured {about['date']} on {machine}, commit {about['commit'] or 'unknown'}; {versions}.",
        "",
        f"Command: `{about['command']}`. Medians of interleaved rounds, with the 20th and 80th percentile; results "
        "that differ from float64 have no time.",
        "",
        *tables(rows),
    ]
    return "\n".join(lines) + "\n"


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Return records as the lines of Markdown tables, one per op."""
    lines: list[str] = []
    for op in dict.fromkeys(row["op"] for row in rows):
        lines += [
            *([""] if lines else []),
            f"### {op}",
            "",
            "| row | who | ms (p20 - p80) | against best peer | GF/s | GB/s | of limit | MiB | latency, ms |",
        ]
        lines += ["| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
        for row in (row for row in rows if row["op"] == op):
            lines.append("| " + " | ".join(_cells(row)) + " |")
    return lines


def _cells(row: dict[str, Any]) -> list[str]:
    name = row["row"].removeprefix(f"{row['op']}/")
    who = f"**{row['contender']}**" if row["ours"] else row["contender"]
    if row["status"] == "wrong":
        return [name, who, f"wrong: error {row['error']:.1e}", *[""] * 6]
    if row["status"] != "ok":
        return [name, who, f"{row['status']}: {row['reason']}".replace("|", "\\|"), *[""] * 6]
    p20, median, p80 = (1e3 * row[key] for key in ("p20_s", "median_s", "p80_s"))
    return [
        name,
        who,
        f"{median:.3g} ({p20:.3g} - {p80:.3g})",
        f"{row['speed_up']:.2f} x" if row["speed_up"] else "",
        f"{row['gflops']:.0f}" if row["gflops"] and row["limit"] == "matmul" else "",
        f"{row['gbytes']:.1f}" if row["gbytes"] and row["limit"] in BANDWIDTH.values() else "",
        f"{row['share_of_limit']:.0%} of {row['limit']}" if row["share_of_limit"] else "",
        f"{row['peak_bytes'] / 2**20:.1f}" if row["peak_bytes"] is not None else "",
        f"{1e3 * row['latency_s']:.3g}" if row.get("latency_s") else "",
    ]


def text(outcome: Outcome) -> str:
    """Format a row for the terminal, one line per contender."""
    rows = records(outcome)
    width = max(len(row["contender"]) for row in rows)
    lines = [outcome.entry.name]
    for row in rows:
        lead = f"  {row['contender']:<{width}}  "
        if row["status"] == "wrong":
            lines.append(f"{lead}WRONG: error {row['error']:.1e} against float64")
        elif row["status"] != "ok":
            lines.append(f"{lead}{row['status']} ({row['reason']})")
        else:
            p20, median, p80 = (1e3 * row[key] for key in ("p20_s", "median_s", "p80_s"))
            parts = [f"{median:9.3f} ms ({p20:.3f} - {p80:.3f})"]
            parts += [f"{row['speed_up']:.2f} x"] if row["speed_up"] else []
            parts += [f"{row['gflops']:.0f} GF/s"] if row["gflops"] and row["limit"] == "matmul" else []
            parts += [f"{row['gbytes']:.1f} GB/s"] if row["gbytes"] and row["limit"] in BANDWIDTH.values() else []
            parts += [f"{row['share_of_limit']:.0%} of {row['limit']}"] if row["share_of_limit"] else []
            parts += [f"{row['peak_bytes'] / 2**20:.1f} MiB"] if row["peak_bytes"] is not None else []
            parts += [f"latency {1e3 * row['latency_s']:.3f} ms"] if row["latency_s"] else []
            lines.append(lead + ", ".join(parts))
    lines += [f"  missed {miss}" for miss in outcome.misses()]
    return "\n".join(lines)
