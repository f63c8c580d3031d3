"""The GPU report as Markdown."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Sequence
from typing import Any

from bench import results
from bench.run import OURS

_CACHED, _ENCODING = OURS, f"{OURS}, with encoding"


def markdown(report: dict[str, Any]) -> str:
    """Return the report: how it went, what is right, what the machine can do, how fast."""
    sections = [
        ("# GPU report", _about(report)),
        ("## Phases", _phases(report["phases"])),
        ("## Tests", _tests(report["tests"])),
        ("## What the machine can do", _rates(report["environment"])),
        ("## Time to first token, on the GPU", _first_token(report["rows"], "median_s")),
        ("## Time to first token, from the host's call", _first_token(report["rows"], "latency_s")),
        ("## Ops", results.tables([row for row in report["rows"] if row["phase"] in ("ops", "ops-mha", "model")])),
    ]
    lines = [line for title, body in sections for line in (title, "", *body, "")]
    return "\n".join(lines).rstrip() + "\n"


def _about(report: dict[str, Any]) -> list[str]:
    lines = ["Rehearsed on the CPU: no figure here is a GPU's.", ""] if report["dry_run"] else []
    commit = report["commit"] or "unknown"
    lines += [f"{report['date']}, commit {commit}, {report['seconds']:.0f} s. Verdict: {report['verdict']}."]
    environment = report["environment"]
    if environment is None:
        return [*lines, "", "The machine could not be looked at."]
    versions = {**environment["versions"], **environment["libraries"]}
    machine = [*environment["devices"], environment["machine"].get("cpu", "an unknown CPU")]
    gpus = ["; ".join(f"{name} {value}" for name, value in gpu.items()) for gpu in environment["gpu"]]
    return [
        *lines,
        "",
        *_table(
            ("what", "found"),
            [
                ("machine", ", ".join(name for name in machine if name != "cpu")),
                *(("GPU", gpu) for gpu in gpus),
                ("versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)),
                ("not installed", ", ".join(name for name, version in versions.items() if not version) or "-"),
                *(("backend " + name, reason or "runs") for name, reason in environment["backends"].items()),
            ],
        ),
    ]


def _phases(outcomes: Sequence[dict[str, Any]]) -> list[str]:
    rows = [
        (phase["name"], phase["status"], f"{phase['seconds']:.0f} of {phase['limit']:.0f}", phase["reason"])
        for phase in outcomes
    ]
    lines = _table(("phase", "status", "seconds", "why"), rows)
    for phase in outcomes:
        if phase["tail"] and phase["status"] == "failed":  # one that was ended tells where, which is anywhere
            lines += ["", f"The end of what {phase['name']} printed:", "", "```", phase["tail"], "```"]
    return lines


def _tests(tests: Sequence[dict[str, Any]]) -> list[str]:
    if not tests:
        return ["No test has run."]
    counts: dict[tuple[str, str], collections.Counter[str]] = {}
    for test in tests:
        counts.setdefault((test["phase"], _kind(test["test"])), collections.Counter())[test["outcome"]] += 1
    lines = _table(
        ("phase", "test", "passed", "failed", "skipped"),
        [(*kind, *(str(count[state]) for state in ("passed", "failed", "skipped"))) for kind, count in counts.items()],
    )
    reasons = collections.Counter(test["reason"] for test in tests if test["outcome"] == "skipped")
    lines += ["", *(f"- skipped {count} times: {_cell(reason)}" for reason, count in reasons.most_common())]
    failed = [test for test in tests if test["outcome"] == "failed"]
    lines += [f"- failed: `{test['test']}`: {_cell(test['reason'])}" for test in failed]
    return lines


def _kind(test: str) -> str:
    """Return what tests are counted by: op, backend and dtype, or the test's name."""
    function, _, parameters = test.rpartition("::")[2].partition("[")
    match = re.match(r"(\w+-(?:triton|cuda)(?:-\w*float\w*)?)(?:-\d+)?\]$", parameters)
    return match.group(1) if match else function


def _rates(environment: dict[str, Any] | None) -> list[str]:
    if environment is None:
        return ["Not measured."]
    rows = [
        (name, f"{rate / 1e12:.1f} TFLOP/s" if name.startswith("matmul") else f"{rate / 1e9:.0f} GB/s")
        for name, rate in environment["rates"].items()
    ]
    return _table(("limit", "measured"), rows)


def _first_token(rows: Iterable[dict[str, Any]], time: str) -> list[str]:
    """Return a line for each context and k; the full text's time is that of its context, whatever the k."""
    timed: dict[tuple[int, int], dict[str, float]] = {}
    full: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["phase"] not in ("ttft", "ttft-k") or row["status"] != "ok" or not row[time]:
            continue
        context, k = int(row["parameters"]["context"]), int(row["parameters"]["k"])
        where = timed.setdefault((context, k), {}) if row["ours"] else full.setdefault(context, {})
        where[row["contender"]] = 1e3 * row[time]
    if not timed:
        return ["Not measured."]
    peers = list(dict.fromkeys(name for times in full.values() for name in times))
    lines = []
    for (context, k), times in sorted(timed.items()):
        best = min(full.get(context, {}).values(), default=None)
        cells = [f"{full.get(context, {}).get(name):.1f}" if name in full.get(context, {}) else "" for name in peers]
        for name in (_CACHED, _ENCODING):
            milliseconds = times.get(name)
            ratio = f" ({best / milliseconds:.1f} x)" if best and milliseconds else ""
            cells.append(f"{milliseconds:.1f}{ratio}" if milliseconds else "")
        lines.append((f"{context:,}", str(k), *cells))
    names = [f"{name}, ms" for name in (*peers, "embeddings cached", "with encoding")]
    return _table(("context", "k", *names), lines)


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [names, ["---"] * len(names), *rows]
    return ["| " + " | ".join(_cell(value) for value in line) + " |" for line in lines]


def _cell(value: str) -> str:
    return value.partition("\n")[0].replace("|", "\\|")
