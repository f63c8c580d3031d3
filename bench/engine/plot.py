"""Plot a run: each op's times as bars, and as curves where a parameter was swept."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # writes files; needs no display

import matplotlib.pyplot as plt  # noqa: E402

_OURS, _PEERS = "#1f6fb4", ("#4a4a4a", "#d9730d", "#8a8a8a", "#b58900", "#6c4f9c", "#2f7d5b", "#a33b3b")


def plot(run: dict[str, Any], folder: Path) -> list[Path]:
    """Write the plots of a run as PNG files into ``folder``, and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    timed = [row for row in run["rows"] if row["status"] == "ok"]
    written = []
    about = run["environment"]
    source = f"{about['machine'].get('cpu', '')}, {about['threads']} threads, {about['date']}"
    for op in dict.fromkeys(row["op"] for row in timed):
        rows = [row for row in timed if row["op"] == op]
        path = folder / f"{op}.png"
        _bars(op, rows, source, path)
        written.append(path)
        for number, (axis, fixed, curves) in enumerate(_curves(rows)):
            path = folder / f"{op}-{axis}-{number}.png"
            _lines(op, axis, fixed, curves, source, path)
            written.append(path)
    return written


def _colours(rows: list[dict[str, Any]]) -> dict[str, str]:
    colours, peers = {}, iter(_PEERS * 9)
    for row in rows:
        if row["contender"] not in colours:
            colours[row["contender"]] = _OURS if row["contender"] == "refrag_kernels" else next(peers)
    return colours


def _bars(op: str, rows: list[dict[str, Any]], source: str, path: Path) -> None:
    colours = _colours(rows)
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.26 * len(rows) + 0.2 * len({row["row"] for row in rows})), dpi=120)
    place, ticks = 0.0, []
    for name in dict.fromkeys(row["row"] for row in rows):
        for row in (row for row in rows if row["row"] == name):
            milliseconds = 1e3 * row["median_s"]
            spread = [[milliseconds - 1e3 * row["p20_s"]], [1e3 * row["p80_s"] - milliseconds]]
            axes.barh(place, milliseconds, height=0.8, color=colours[row["contender"]], xerr=spread, ecolor="#999999")
            axes.annotate(
                f"{row['contender']}, {milliseconds:.3g} ms", (milliseconds, place), xytext=(8, 0),
                textcoords="offset points", va="center", fontsize=7,
            )  # fmt: skip
            ticks.append((place, name.removeprefix(f"{op}/") if not ticks or ticks[-1][1] != name else ""))
            place += 1
        place += 0.8
    labels: dict[str, list[float]] = defaultdict(list)
    for position, label in ticks:
        labels[label].append(position)
    axes.set_yticks([sum(p) / len(p) for p in labels.values()], [label.replace("/", "\n", 2) for label in labels])
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    left, right = axes.get_xlim()
    axes.set_xlim(left, right * (right / left) ** 0.45)  # room for the labels to the right of the bars
    _finish(figure, axes, f"{op}: median, p20 to p80", "milliseconds", source, path)


def _curves(rows: list[dict[str, Any]]) -> list[tuple[str, str, dict[str, list[tuple[float, float]]]]]:
    """Return (parameter, fixed parameters, contender -> points) for each parameter with three or more values."""
    groups: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        for axis, value in row["parameters"].items():
            rest = [f"{name} {fixed:g}" for name, fixed in row["parameters"].items() if name != axis]
            fixed = ", ".join([row["case"], row["preset"], *rest, row["dtype"]])
            curves = groups.setdefault((axis, fixed), defaultdict(list))
            curves[row["contender"]].append((value, 1e3 * row["median_s"]))
    return [
        (axis, fixed, curves)
        for (axis, fixed), curves in groups.items()
        if max(len(points) for points in curves.values()) >= 3
    ]


def _lines(
    op: str, axis: str, fixed: str, curves: dict[str, list[tuple[float, float]]], source: str, path: Path
) -> None:
    figure, axes = plt.subplots(figsize=(8, 5), dpi=120)
    peers = iter(_PEERS * 9)
    for name, points in curves.items():
        colour = _OURS if name == "refrag_kernels" else next(peers)
        axes.plot(*zip(*sorted(points)), marker="o", color=colour, label=name)
    values = sorted({value for points in curves.values() for value, _ in points})
    if values[0] > 0 and values[-1] / values[0] > 3:
        axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()
    axes.set_yscale("log")
    axes.set_ylabel("milliseconds")
    axes.legend(fontsize=8, frameon=False)
    _finish(figure, axes, f"{op}: {fixed}", axis, source, path)


def _finish(figure, axes, title: str, x_label: str, source: str, path: Path) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(f"{x_label}\n{source}", fontsize=8)
    axes.grid(True, axis="both", which="major", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
