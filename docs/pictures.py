"""Draw the pictures of the documentation: ``python docs/pictures.py`` writes docs/images/*.svg."""

from __future__ import annotations

from pathlib import Path

from refrag.demo.pictures import layout_svg, plan_svg

import refrag_kernels as rk

FOLDER = Path(__file__).parent / "images"

# A prefix, a compressed passage with one chunk expanded, another passage, a question.
LENGTHS = [32, 1, 1, 1, 1, 16, 1, 1, 1, 1, 16, 16, 24]
PASSAGES = [-1, *[0] * 9, 1, 1, -1]


def pictures() -> dict[str, str]:
    """Return each picture's SVG by its file name."""
    layout = rk.ChunkLayout.from_lengths([LENGTHS])
    two = rk.ChunkLayout.from_lengths([LENGTHS, [20, 1, 1, 1, 1, 30]])
    encoder = rk.ChunkLayout.from_lengths([[16] * 8])
    return {
        "layout.svg": layout_svg(two),
        "plan-full.svg": plan_svg(rk.plan_attention(layout), 420),
        "plan-passages.svg": plan_svg(rk.plan_attention(layout, rk.ChunkMask.passages(PASSAGES)), 420),
        "plan-encoder.svg": plan_svg(rk.plan_attention(encoder, rk.ChunkMask.diagonal(), causal=False), 420),
        "plan-window.svg": plan_svg(rk.plan_attention(layout, window=40), 420),
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, svg in pictures().items():
        (FOLDER / name).write_text(svg)
