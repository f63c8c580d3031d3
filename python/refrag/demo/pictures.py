"""Draws layouts, masks and plans as SVG: which pairs of rows are allowed, and which are computed."""

from __future__ import annotations

from refrag_kernels import AttentionPlan, ChunkLayout

MOST_ROWS = 4096  # with more, browsers are slow because of the number of shapes
_CELLS = 512  # maximum number of rows for drawing the pairs of a partial tile one by one
_TILE = 16

FULL, ALLOWED, WASTE, SLOT, TEXT = "#1f6fb4", "#5aa0d8", "#f3c48b", "#d9730d", "#b9cfe4"


def layout_svg(layout: ChunkLayout, width: int = 720) -> str:
    """Draw a strip for each sequence: text spans and expanded chunks as bars, slots as marks.

    Parameters
    ----------
    layout : ChunkLayout
    width : int
        Width of the picture in pixels.
    """
    lengths = layout.lengths()
    scale = width / max(1, *(sum(sequence) for sequence in lengths)) if lengths else 1.0
    shapes = []
    for number, sequence in enumerate(lengths):
        at, top = 0, 26 * number
        for length in sequence:
            colour = SLOT if length == 1 else TEXT
            shapes.append(_rect(at * scale, top, length * scale, 20, colour, f"{length} row{'s' * (length > 1)}"))
            at += length
    return _svg(width, 26 * max(1, len(lengths)), shapes, "chunks of each sequence", edge=True)


def plan_svg(plan: AttentionPlan, size: int = 640) -> str:
    """Draw the matrix of a plan: query rows down, key rows across.

    Full tiles of 16 x 16 pairs, which are computed without a mask, are dark blue. In partial tiles, allowed pairs are
    light blue, and pairs that are computed but not allowed are orange. Skipped tiles are white.

    Parameters
    ----------
    plan : AttentionPlan
    size : int
        Width and height of the picture in pixels.

    Raises
    ------
    ValueError
        If the plan has more than 4,096 query or key rows.
    """
    plan = plan.to("cpu")
    q_rows, kv_rows, blocks, *_ = plan.sizes.tolist()
    if max(q_rows, kv_rows) > MOST_ROWS:
        raise ValueError(f"plan: got {max(q_rows, kv_rows):,} rows, needs at most {MOST_ROWS:,} to be drawn")
    scale = size / max(1, q_rows, kv_rows)
    cells = max(q_rows, kv_rows) <= _CELLS
    shapes = []
    full, partial = plan.full_offsets.tolist(), plan.partial_offsets.tolist()
    for block, (first, rows, keys_from, keys) in enumerate(plan.q_blocks[:blocks].tolist()):
        for start, end in plan.full_ranges[full[block] : full[block + 1]].tolist():
            shapes.append(_rect(start * scale, first * scale, (end - start) * scale, rows * scale, FULL))
        for entry in range(partial[block], partial[block + 1]):
            key = int(plan.partial_keys[entry])
            columns = min(_TILE, keys_from + keys - key)
            shapes.append(_rect(key * scale, first * scale, columns * scale, rows * scale, WASTE))
            words = plan.partial_bits[entry].tolist()
            if not cells:
                bits = sum((word & 0xFFFFFFFF).bit_count() for word in words)
                height = rows * scale * bits / (rows * columns)  # the allowed fraction of the tile
                shapes.append(_rect(key * scale, first * scale, columns * scale, height, ALLOWED))
                continue
            for row in range(rows):
                bits = words[row // 2] >> (16 * (row % 2)) & 0xFFFF
                for start, end in _runs(bits):
                    box = ((key + start) * scale, (first + row) * scale, (end - start) * scale, scale)
                    shapes.append(_rect(*box, ALLOWED))
    return _svg(size, size, shapes, "attention plan: query rows down, key rows across")


def _runs(bits: int) -> list[tuple[int, int]]:
    """Return the runs [start, end) of ones."""
    runs, start = [], None
    for place in range(_TILE + 1):
        one = bits >> place & 1
        if one and start is None:
            start = place
        elif not one and start is not None:
            runs.append((start, place))
            start = None
    return runs


def _rect(x: float, y: float, width: float, height: float, colour: str, title: str = "") -> str:
    inside = f"<title>{title}</title>" if title else ""
    return f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" fill="{colour}">{inside}</rect>'


def _svg(width: int, height: int, shapes: list[str], label: str, edge: bool = False) -> str:
    # Adjacent tiles share edges, and without antialiasing there are no seams between them.
    style = ' stroke="#ffffff" stroke-width="0.6"' if edge else ' shape-rendering="crispEdges"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{label}"><rect width="{width}" height="{height}" fill="#ffffff"/>'
        f"<g{style}>{''.join(shapes)}</g></svg>\n"
    )
