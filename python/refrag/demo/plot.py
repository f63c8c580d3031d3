"""Plots of the cost of readings against the context length, for the demo and the report."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import matplotlib

matplotlib.use("Agg")  # writes files without a display

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator  # noqa: E402

from refrag.demo.demo import CACHED, ENCODED, FULL, READINGS  # noqa: E402
from refrag.demo.timing import Reading  # noqa: E402

_COLOURS = {FULL: "#4a4a4a", ENCODED: "#d9730d", CACHED: "#1f6fb4"}
_MARKERS = {FULL: "o", ENCODED: "s", CACHED: "D"}


def plot_first_token(points: dict[int, dict[str, Reading]], k: int, path: Path) -> None:
    """Plot the time to first token of each reading against the context length, on logarithmic axes.

    Parameters
    ----------
    points : dict
        Context tokens -> readings.
    k : int
        Tokens per chunk, for the title.
    path : Path
        PNG file to write.
    """
    curves = {name: [(count, points[count][name].first_token) for count in sorted(points)] for name in _COLOURS}
    title = f"Time to first token, k = {k}, float32, CPU"
    plot_curves(curves, title, "time to first token, seconds", "faster", path)


def plot_curves(
    curves: dict[str, list[tuple[int, float]]], title: str, y_label: str, better: str, to: Path | BinaryIO
) -> None:
    """Plot the cost of readings against the context length, on logarithmic axes.

    Parameters
    ----------
    curves : dict
        Name of a reading in the demo's ``READINGS`` -> (tokens, cost) in ascending order. All other readings are
        compared with ``FULL``.
    title, y_label : str
    better : str
        The word for a lower cost, such as "faster".
    to : Path or binary file
        Where to write the PNG.
    """
    tokens = [count for count, _ in curves[FULL]]
    figure, axes = plt.subplots(figsize=(8, 5), dpi=150)
    for name, points in curves.items():
        costs = [cost for _, cost in points]
        axes.plot(tokens, costs, color=_COLOURS[name], marker=_MARKERS[name], linewidth=2, markersize=5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("context, tokens (question included)")
    axes.set_ylabel(y_label)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _label_ends(axes, curves, better)
    figure.savefig(to, bbox_inches="tight", format="png")
    plt.close(figure)


def _label_ends(axes: Axes, curves: dict[str, list[tuple[int, float]]], better: str) -> None:
    """Label each curve at its end; move labels up where ends are close to each other."""
    lowest = float("-inf")
    for name, points in sorted(curves.items(), key=lambda curve: curve[1][-1][1]):
        tokens, cost = points[-1]
        label = READINGS[name]
        if name != FULL:
            label += f"\n{curves[FULL][-1][1] / cost:.1f} x {better} at {tokens:,} tokens"
        end = axes.transData.transform((tokens, cost))[1] * 72 / axes.figure.dpi  # in points, like font sizes
        place = max(end, lowest + 30)
        lowest = place
        axes.annotate(
            label, points[-1], xytext=(10, place - end), textcoords="offset points", color=_COLOURS[name], va="center",
            fontsize=9,
        )  # fmt: skip
