"""Format the GPU report as Markdown."""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from bench.engine import results
from bench.engine.run import OURS

_CACHED, _ENCODING = OURS, f"{OURS}, with encoding"
_LAYERS = 32  # layers that share a plan


def markdown(report: dict[str, Any]) -> str:
    """Return the report: the blocks' outcomes, the tests, and a section for each block's results."""
    lines = report["results"]
    found = {
        outcome["name"]: [line for line in lines if line["block"] == outcome["name"]] for outcome in report["blocks"]
    }
    sections = [("# GPU report", _about(report)), ("## Blocks", _blocks(report["blocks"]))]
    if report["unfit"]:
        sections.append(("## Results that don't fit the schema", [f"- {_cell(text)}" for text in report["unfit"]]))
    if tests := [line for line in lines if "outcome" in line]:
        sections.append(("## Tests", _tests(tests)))
    for name, own in found.items():
        measured = rows(own)
        if plain := [line for line in own if "outcome" not in line and line not in measured]:
            sections.append((f"## {name}", _plain(plain)))
    measured = rows(lines)
    if measured:
        sections += [
            ("## Time to first token, on the GPU", _first_token(measured, "median_s")),
            ("## Time to first token, from the host's call", _first_token(measured, "latency_s")),
            ("## Ops", results.tables(measured)),
            ("## Attention with its plan", _plans(measured, _empty_kernel(lines))),
        ]
    text = [line for title, body in sections for line in (title, "", *body, "")]
    return "\n".join(text).rstrip() + "\n"


def rows(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the results that are benchmark records, one per contender of a row."""
    return [line for line in lines if {"row", "op", "contender", "share_of_limit"} <= set(line)]


def _about(report: dict[str, Any]) -> list[str]:
    lines = ["Dry run on the CPU: no figure here is from a GPU.", ""] if report["dry_run"] else []
    commit = report["commit"] or "unknown"
    return [*lines, f"{report['date']}, commit {commit}, {report['seconds']:.0f} s. Verdict: {report['verdict']}."]


def _blocks(outcomes: Sequence[dict[str, Any]]) -> list[str]:
    cells = [
        (block["name"], block["status"], f"{block['seconds']:.0f} of {block['limit']:.0f}", block["reason"])
        for block in outcomes
    ]
    lines = _table(("block", "status", "seconds", "why"), cells)
    for block in outcomes:
        if block["tail"]:
            lines += ["", f"The end of what {block['name']} printed:", "", "```", block["tail"], "```"]
    return lines


def _tests(tests: Sequence[dict[str, Any]]) -> list[str]:
    counts: dict[tuple[str, str], collections.Counter[str]] = {}
    for test in tests:
        where = f"{test['block']}, {test['tool']}" if test.get("tool") else test["block"]
        counts.setdefault((where, _kind(test["case"])), collections.Counter())[test["outcome"]] += 1
    states = ("passed", "failed", "skipped")
    lines = _table(
        ("block", "test", *states),
        [(*kind, *(str(count[state]) for state in states)) for kind, count in counts.items()],
    )
    reasons = collections.Counter(test["reason"] for test in tests if test["outcome"] == "skipped")
    lines += ["", *(f"- skipped {count} times: {_cell(reason)}" for reason, count in reasons.most_common())]
    failed = [test for test in tests if test["outcome"] == "failed"]
    lines += [f"- failed: `{test['case']}`: {_cell(test['reason'])}" for test in failed]
    return lines


def _kind(test: str) -> str:
    """Return the key that tests are counted by: op, backend and dtype, or the test's name."""
    function, _, parameters = test.rpartition("::")[2].partition("[")
    match = re.match(r"(\w+-(?:triton|cuda)(?:-\w*float\w*)?)(?:-\d+)?\]$", parameters)
    return match.group(1) if match else function


def _plain(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Return results unchanged, with one table per set of column names."""
    kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for line in lines:
        names = tuple(name for name in line if name not in ("block", "case"))
        kinds.setdefault(names, []).append(line)
    tables: list[str] = []
    for names, same in kinds.items():
        names = tuple(sorted(names, key=lambda name: not isinstance(same[0][name], str)))  # names first, then figures
        titles = ("case", *(name[:-2] + ", ms" if _seconds(name) else name for name in names))
        cells = [(line["case"], *(_value(name, line[name]) for name in names)) for line in same]
        tables += ([""] if tables else []) + _table(titles, cells)
    return tables


def _seconds(name: str) -> bool:
    return name.endswith("_s") and not name.endswith("_per_s")


def _value(name: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(key, item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list):
        return "; ".join(_value(name, item) for item in value)
    if _seconds(name):
        return f"{1e3 * value:.3g}"
    if name in ("bytes_per_s", "flop_per_s") or name.endswith("_bytes_per_s"):
        return f"{value / 1e12:.4g} T"
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def _empty_kernel(lines: Iterable[dict[str, Any]]) -> float:
    """Return the time of an empty kernel in this run: the launch and event overhead that every time includes."""
    return next((line["median_s"] for line in lines if line["case"] == "empty kernel"), 0.0)


def _first_token(rows: Iterable[dict[str, Any]], time: str) -> list[str]:
    """Return a line for each context and k; the full text's time depends only on the context."""
    timed: dict[tuple[str, int, int], dict[str, float]] = {}
    full: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        if row["op"] != "ttft" or row["status"] != "ok" or not row[time]:
            continue
        preset, context, k = row["preset"], int(row["parameters"]["context"]), int(row["parameters"]["k"])
        where = timed.setdefault((preset, context, k), {}) if row["ours"] else full.setdefault((preset, context), {})
        where[row["contender"]] = 1e3 * row[time]
    if not timed:
        return ["Not measured."]
    peers = list(dict.fromkeys(name for times in full.values() for name in times))
    lines = []
    for (preset, context, k), times in sorted(timed.items()):
        others = full.get((preset, context), {})
        best = min(others.values(), default=None)
        cells = [f"{others[name]:.1f}" if name in others else "" for name in peers]
        for name in (_CACHED, _ENCODING):
            milliseconds = times.get(name)
            ratio = f" ({best / milliseconds:.1f} x)" if best and milliseconds else ""
            cells.append(f"{milliseconds:.1f}{ratio}" if milliseconds else "")
        lines.append((preset, f"{context:,}", str(k), *cells))
    names = [f"{name}, ms" for name in (*peers, "embeddings cached", "with encoding")]
    return _table(("preset", "context", "k", *names), lines)


def _plans(rows: Iterable[dict[str, Any]], empty: float) -> list[str]:
    """Return attention's throughput in allowed pairs, and its time including a plan for one layer or many."""
    lines = []
    for row in rows:
        if row["op"] != "mixed_attention" or row["status"] != "ok" or not row["gflops"]:
            continue
        plan, median = row.get("plan_s"), row["median_s"]
        alone, shared = (median + plan / layers if plan is not None else None for layers in (1, _LAYERS))
        lines.append(
            (
                row["row"].partition("/")[2],
                row["contender"],
                f"{row['gflops'] / 1e3:.3g}",
                f"{1e3 * median:.3g}",
                f"{1e3 * (median - empty):.3g}" if 0 < empty < median else "",
                *(f"{1e3 * seconds:.3g}" if seconds is not None else "" for seconds in (plan, alone, shared)),
            )
        )
    if not lines:
        return ["Not measured."]
    names = ("ms", "less an empty kernel, ms", "plan, ms", "plan + one layer, ms", f"a layer of {_LAYERS}, ms")
    return _table(("row", "who", "TFLOP/s of visible pairs", *names), lines)


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [names, ["---"] * len(names), *rows]
    return ["| " + " | ".join(_cell(value) for value in line) + " |" for line in lines]


def _cell(value: str) -> str:
    return value.partition("\n")[0].replace("|", "\\|")
