"""``refrag report``: one HTML file, without anything from elsewhere, on a user's layout and the demo's figures."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path
from typing import Any

from refrag.pictures import ALLOWED, FULL, SLOT, TEXT, WASTE, layout_svg, plan_svg
from refrag_kernels import ChunkLayout, ChunkMask, plan_attention

_CURVES = {
    "full": ("full text, HF SDPA", "#4a4a4a"),
    "encoded": ("compressed, with encoding", "#d9730d"),
    "cached": ("compressed, cached", "#1f6fb4"),
}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
svg { max-width: 100%; height: auto; border: 1px solid #ddd; } svg.plain { border: 0; }
table { border-collapse: collapse; } td, th { padding: .2rem .9rem .2rem 0; text-align: right; }
td:first-child, th:first-child { text-align: left; } th { border-bottom: 1px solid #bbb; font-weight: 600; }
.key span { display: inline-block; width: .9em; height: .9em; margin: 0 .35em 0 1em; vertical-align: -1px; }
"""


def numbers(text: str, option: str) -> list[int]:
    """Return "64,8x1,32" as 64, eight times 1, 32.

    Raises
    ------
    ValueError
        If it is something else; names ``option``.

    Examples
    --------
    >>> numbers("4,3x1,2", "--layout")
    [4, 1, 1, 1, 2]
    """
    found: list[int] = []
    for part in text.split(","):
        count, times, value = part.strip().rpartition("x")
        try:
            found += [int(value)] * (int(count) if times else 1)
        except ValueError:
            raise ValueError(f"{option}: got {part.strip()!r}, needs numbers such as 64,8x1,32") from None
    return found


def read_figures(path: Path) -> dict[str, Any]:
    """Read the figures that ``refrag demo`` wrote.

    Raises
    ------
    ValueError
        If the file holds something else.
    """
    try:
        figures = json.loads(path.read_text())
        if not figures["plot"] or not figures["table"]["full"]["kv_cache_bytes"]:
            raise KeyError("plot")
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"--figures: {path} holds no curves, needs the figures.json of `refrag demo`") from None
    return figures


def report(layout: ChunkLayout, masks: dict[str, ChunkMask], causal: bool, figures: dict[str, Any] | None) -> str:
    """Return the report as HTML.

    Parameters
    ----------
    layout : ChunkLayout
        Drawn, and planned under each mask.
    masks : dict of str to ChunkMask
        By title.
    causal : bool
    figures : dict or None
        What ``refrag demo`` measured; without it the report has no curves.
    """
    body = [f"<h1>{layout.total_rows:,} rows in {layout.num_chunks:,} chunks</h1>", "<h2>Layout</h2>"]
    body += [_key((TEXT, "text, or an expanded chunk"), (SLOT, "slot of a compressed chunk")), layout_svg(layout)]
    for title, mask in masks.items():
        plan = plan_attention(layout, mask, causal=causal)
        stats = plan.stats()
        allowed, computed = stats["pairs_allowed"], stats["pairs_computed"]
        body.append(f"<h2>Mask and plan: {html.escape(title)}{', causal' if causal else ''}</h2>")
        rows = [("pairs of rows allowed", f"{allowed:,}"), ("pairs computed", f"{computed:,}")]
        rows += [("computed for each allowed", f"{computed / allowed:.2f}" if allowed else "none is allowed")]
        rows += [(f"tiles {kind}", f"{stats[f'tiles_{kind}']:,}") for kind in ("full", "partial", "skipped")]
        body.append(_table(["", ""], rows))
        key = ((FULL, "full tile"), (ALLOWED, "allowed pair of a partial tile"), (WASTE, "computed for nothing"))
        body += [_key(*key), plan_svg(plan)]
    if figures is not None:
        body += _measured(figures)
    content = "\n".join(body)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>refrag report</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{content}\n</body></html>\n"
    )


def _measured(figures: dict[str, Any]) -> list[str]:
    machine, k = figures["machine"], figures["settings"]["k"]
    contexts = sorted(int(tokens) for tokens in figures["plot"])
    per_row = figures["table"]["full"]["kv_cache_bytes"] / figures["table"]["full"]["rows"]
    seconds, mebibytes, rows = {}, {}, []
    for name in _CURVES:
        points = [(tokens, figures["plot"][str(tokens)][name]) for tokens in contexts]
        times = [(tokens, sorted(p["seconds_to_first_token"])) for tokens, p in points]
        seconds[name] = [(tokens, values[len(values) // 2]) for tokens, values in times]
        mebibytes[name] = [(tokens, p["rows"] * per_row / 2**20) for tokens, p in points]
    for place, tokens in enumerate(contexts):
        cells = [f"{seconds[name][place][1]:.3f}" for name in _CURVES]
        rows.append((f"{tokens:,}", *cells, *(f"{mebibytes[name][place][1]:.1f}" for name in ("full", "cached"))))
    source = f"{machine['processor']}, {machine['threads']} threads, {machine['dtype']}, k = {k}"
    heads = ["context, tokens", *(f"{label}, s" for label, _ in _CURVES.values()), "KV cache full, MiB", "compressed"]
    del mebibytes["encoded"]  # the same rows as cached
    return [
        "<h2>Time to first token, seconds</h2>",
        f"<p>{html.escape(source)}; written by <code>refrag demo</code>.</p>",
        _curves(seconds),
        "<h2>Keys and values in the cache, MiB</h2>",
        _curves(mebibytes),
        _table(heads, rows),
    ]


def _curves(curves: dict[str, list[tuple[int, float]]]) -> str:
    """Return curves over the context's tokens, both axes logarithmic."""
    width, height, left, bottom = 720, 360, 70, 40
    xs = [x for points in curves.values() for x, _ in points]
    ys = [y for points in curves.values() for _, y in points]
    low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))

    def place(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / min(xs)) / (math.log(max(xs) / min(xs)) or 1)
        up = (math.log10(y) - low) / ((high - low) or 1)
        return left + across * (width - left - 190), height - bottom - up * (height - bottom - 20)

    shapes = []
    for power in range(low, high + 1):
        _, y = place(min(xs), 10.0**power)
        shapes.append(f'<line x1="{left}" x2="{width - 190}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        shapes.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for x in sorted(set(xs)):
        across, _ = place(x, 10.0**low)
        shapes.append(f'<text x="{across:.1f}" y="{height - bottom + 20}" text-anchor="middle">{x:,}</text>')
    ends = []
    for name, points in curves.items():
        label, colour = _CURVES[name]
        places = [place(*point) for point in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        shapes.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        shapes += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        ends.append((places[-1], label, colour))
    below = 0.0
    for (x, y), label, colour in sorted(ends, key=lambda end: end[0][1]):
        below = max(y + 4, below + 15)  # labels of curves that end together stand one below the other
        shapes.append(f'<text x="{x + 10:.1f}" y="{below:.1f}" fill="{colour}">{label}</text>')
    return (
        f'<svg class="plain" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-size="12" font-family="system-ui, sans-serif">{"".join(shapes)}</svg>'
    )


def _key(*entries: tuple[str, str]) -> str:
    spans = "".join(f'<span style="background:{colour}"></span>{label}' for colour, label in entries)
    return f'<p class="key">{spans}</p>'


def _table(heads: list[str], rows: list[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads) if any(heads) else ""
    lines = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"
