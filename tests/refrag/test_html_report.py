"""The HTML report: the contents of its pictures, and their display in a browser."""

import re
import shutil
import struct
import subprocess
import xml.dom.minidom

import pytest
from refrag.cli import app
from refrag.demo import html_report, pictures
from typer.testing import CliRunner

from refrag_kernels import ChunkLayout, ChunkMask, plan_attention

FIGURES = {
    "machine": {"processor": "a <CPU>", "threads": 2, "dtype": "float32"},
    "settings": {"k": 16},
    "table": {"full": {"rows": 100, "kv_cache_bytes": 100 * 2**20}},
    "plot": {
        str(tokens): {
            name: {"rows": rows, "seconds_to_first_token": [3.0 * rows, 1.0 * rows, 2.0 * rows]}
            for name, rows in (("full", tokens), ("encoded", tokens // 16), ("cached", tokens // 16))
        }
        for tokens in (512, 1024)
    },
}


def area(svg, colour):
    boxes = re.findall(rf'width="([\d.]+)" height="([\d.]+)" fill="{colour}"', svg)
    return sum(float(width) * float(height) for width, height in boxes)


@pytest.mark.parametrize("mask", [ChunkMask.full(), ChunkMask.diagonal(), ChunkMask.passages([-1, 0, 0, 1, -1])])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [1, 11])
def test_the_picture_has_the_areas_of_the_plan(mask, causal, scale):
    layout = ChunkLayout.from_lengths([[19 * scale, 1, 16 * scale, 30 * scale, 7]])
    plan = plan_attention(layout, mask, causal=causal)
    rows, stats = layout.total_rows, plan.stats()
    svg = pictures.plan_svg(plan, size=rows)  # one pixel per pair
    full, allowed, waste = (area(svg, colour) for colour in (pictures.FULL, pictures.ALLOWED, pictures.WASTE))
    assert full + allowed == pytest.approx(stats["pairs_allowed"], rel=1e-3)
    assert allowed <= waste <= stats["pairs_computed"] - full
    # Tiles are clipped at the end of the sequence.
    boxes = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', svg)
    assert len(boxes) > 2
    assert all(float(x) + float(w) <= rows + 0.01 and float(y) + float(h) <= rows + 0.01 for x, y, w, h in boxes)


def test_the_layout_is_drawn_chunk_by_chunk():
    svg = pictures.layout_svg(ChunkLayout.from_lengths([[4, 1, 1, 2], [3]]))
    assert svg.count(pictures.SLOT) == 2 and svg.count(pictures.TEXT) == 3
    xml.dom.minidom.parseString(svg)


def test_too_many_rows_are_refused():
    with pytest.raises(ValueError, match="got 5,000 rows, needs at most 4,096"):
        pictures.plan_svg(plan_attention(ChunkLayout.from_lengths([[5000]])))


@pytest.fixture
def written(tmp_path):
    layout = ChunkLayout.from_lengths([[64, *[1] * 24, 16, 16, *[1] * 24, 40]])
    masks = {"all": ChunkMask.full(), "passages": ChunkMask.passages([-1, *[0] * 26, *[1] * 24, -1])}
    path = tmp_path / "report.html"
    path.write_text(html_report.report(layout, masks, True, FIGURES))
    return path


def test_the_report_needs_nothing_from_elsewhere(written):
    text = written.read_text()
    assert not re.search(r"src=\"(?!data:)|href=|@import|url\(", text)
    assert text.count("<svg") == 3 and text.count("<img") == 2 and "a &lt;CPU&gt;" in text
    assert "<td>512</td><td>1024.000</td><td>64.000</td><td>64.000</td><td>512.0</td><td>32.0</td>" in text


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_shows_it(written, tmp_path):
    picture = tmp_path / "report.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run(
        [BROWSER, *options, "--window-size=1000,2600", f"--screenshot={picture}", written.as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG") and struct.unpack(">II", data[16:24]) == (1000, 2600)
    from matplotlib.image import imread  # after the check above; reads the pixels of a real page

    pixels = imread(picture)[..., :3]
    for colour in (pictures.FULL, pictures.ALLOWED, pictures.WASTE, pictures.SLOT):
        wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(pixels - wanted).max(-1) < 0.01).sum() > 50, f"{colour} is not on the page"


def run(*arguments):
    return CliRunner().invoke(app, ["report", *arguments], env={"COLUMNS": "100"})


def test_the_command(tmp_path):
    output = tmp_path / "out.html"
    result = run("--layout", "64,4x1,16;20", "--passages", "-1,2x0,2x1,-1,-1", "--output", str(output))
    assert result.exit_code == 0, result.output
    assert "105" not in result.output and "104 rows in 7 chunks" in output.read_text()
    assert output.read_text().count("Mask and plan") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "64,a"], "--layout: got 'a'"),
        (["--layout", "64,0"], "lengths: got 0 for chunk 1"),
        (["--passages", "-1"], "mask: got 1 entries"),
        (["--layout", "5000"], "got 5,000 rows"),
        (["--figures", "pyproject.toml"], "--figures: pyproject.toml has no curves"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, tmp_path):
    result = run(*arguments, "--output", str(tmp_path / "out.html"))
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.output
    assert not (tmp_path / "out.html").exists()
