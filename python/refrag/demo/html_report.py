"""``refrag report``: one self-contained HTML file about a layout and the demo's figures."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from refrag.demo.pictures import ALLOWED, FULL, SLOT, TEXT, WASTE, layout_svg, plan_svg
from refrag_kernels import ChunkLayout, ChunkMask, plan_attention

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
svg, img { max-width: 100%; height: auto; } svg { border: 1px solid #ddd; }
table { border-collapse: collapse; } td, th { padding: .2rem .9rem .2rem 0; text-align: right; }
td:first-child, th:first-child { text-align: left; } th { border-bottom: 1px solid #bbb; font-weight: 600; }
.key span { display: inline-block; width: .9em; height: .9em; margin: 0 .35em 0 1em; vertical-align: -1px; }
"""


def numbers(text: str, option: str) -> list[int]:
    """Parse a list such as "64,8x1,32": 64, eight times 1, 32.

    Raises
    ------
    ValueError
        If it is not such a list. The message names ``option``.

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
        If the file has no such figures.
    """
    try:
        figures = json.loads(path.read_text())
        if not figures["plot"] or not figures["table"]["full"]["kv_cache_bytes"]:
            raise KeyError("plot")
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"--figures: {path} has no curves, needs the figures.json of `refrag demo`") from None
    return figures


def report(layout: ChunkLayout, masks: dict[str, ChunkMask], causal: bool, figures: dict[str, Any] | None) -> str:
    """Return the report as HTML.

    Parameters
    ----------
    layout : ChunkLayout
        The layout to draw, and to plan for each mask.
    masks : dict of str to ChunkMask
        Masks by title.
    causal : bool
    figures : dict or None
        The figures of ``refrag demo``; without them the report has no curves.
    """
    body = [f"<h1>{layout.total_rows:,} rows in {layout.num_chunks:,} chunks</h1>", "<h2>Layout</h2>"]
    body += [_key((TEXT, "text, or an expanded chunk"), (SLOT, "slot of a compressed chunk")), layout_svg(layout)]
    for title, mask in masks.items():
        plan = plan_attention(layout, mask, causal=causal)
        stats = plan.stats()
        allowed, computed = stats["pairs_allowed"], stats["pairs_computed"]
        body.append(f"<h2>Mask and plan: {html.escape(title)}{', causal' if causal else ''}</h2>")
        rows = [("pairs of rows allowed", f"{allowed:,}"), ("pairs computed", f"{computed:,}")]
        rows += [("computed per allowed pair", f"{computed / allowed:.2f}" if allowed else "none allowed")]
        rows += [(f"tiles {kind}", f"{stats[f'tiles_{kind}']:,}") for kind in ("full", "partial", "skipped")]
        body.append(_table(["", ""], rows))
        key = ((FULL, "full tile"), (ALLOWED, "allowed pair of a partial tile"), (WASTE, "computed but not allowed"))
        body += [_key(*key), plan_svg(plan)]
    if figures is not None:
        body += _measured(figures)
    content = "\n".join(body)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>refrag report</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{content}\n</body></html>\n"
    )


def _measured(figures: dict[str, Any]) -> list[str]:
    # Imported here, since matplotlib and the demo's models are slow to import and a layout alone doesn't need them.
    from refrag.demo.demo import CACHED, ENCODED, FULL, READINGS
    from refrag.demo.plot import plot_curves

    machine, k = figures["machine"], figures["settings"]["k"]
    contexts = sorted(map(int, figures["plot"]))
    per_row = figures["table"][FULL]["kv_cache_bytes"] / figures["table"][FULL]["rows"]

    def curve(name: str, cost: Callable[[dict[str, Any]], float]) -> list[tuple[int, float]]:
        return [(tokens, cost(figures["plot"][str(tokens)][name])) for tokens in contexts]

    seconds = {name: curve(name, lambda p: median(p["seconds_to_first_token"])) for name in (FULL, ENCODED, CACHED)}
    mebibytes = {name: curve(name, lambda p: p["rows"] * per_row / 2**20) for name in (FULL, CACHED)}

    def image(curves: dict[str, list[tuple[int, float]]], title: str, y_label: str, better: str) -> str:
        png = io.BytesIO()
        plot_curves(curves, title, y_label, better, png)
        return f'<img alt="{title}" src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}">'

    rows = [
        (
            f"{tokens:,}",
            *(f"{points[place][1]:.3f}" for points in seconds.values()),
            *(f"{points[place][1]:.1f}" for points in mebibytes.values()),
        )
        for place, tokens in enumerate(contexts)
    ]
    heads = ["context, tokens", *(f"{READINGS[name]}, s" for name in seconds), "KV cache full, MiB", "compressed"]
    source = f"{machine['processor']}, {machine['threads']} threads, {machine['dtype']}, k = {k}"
    return [
        "<h2>Time to first token, and keys and values in the cache</h2>",
        f"<p>{html.escape(source)}; measured by <code>refrag demo</code>.</p>",
        image(seconds, f"Time to first token, k = {k}", "time to first token, seconds", "faster"),
        image(mebibytes, f"Keys and values in the cache, k = {k}", "MiB", "less"),
        _table(heads, rows),
    ]


def _key(*entries: tuple[str, str]) -> str:
    spans = "".join(f'<span style="background:{colour}"></span>{label}' for colour, label in entries)
    return f'<p class="key">{spans}</p>'


def _table(heads: list[str], rows: Sequence[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads) if any(heads) else ""
    lines = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"
