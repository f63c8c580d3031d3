"""The command line, run as by a user."""

import json
import os
import subprocess
import sys

import pytest
from refrag.cli import app
from refrag.demo import demo
from refrag.demo.corpus import python_reference
from typer.testing import CliRunner

SMALL = ["--context-tokens", "160", "--plot-tokens", "", "--max-new-tokens", "4", "--rounds", "1"]


@pytest.fixture
def small_corpus(monkeypatch):
    """Use only the shortest topics: encoding the whole corpus takes half a minute."""
    passages = python_reference()[:24]
    monkeypatch.setattr(demo, "python_reference", lambda: passages)


@pytest.fixture
def unranked_corpus(monkeypatch):
    """Use the whole corpus without ranking it."""

    class Unranked:
        def __init__(self, encoder, tokenizer, passages, track):
            self.passages = passages

        def rank(self, question):
            return [(passage, 0.0) for passage in self.passages]

    monkeypatch.setattr(demo, "Retriever", Unranked)


def run(*arguments):
    return CliRunner().invoke(app, ["demo", *arguments], env={"COLUMNS": "100"})


def test_demo(small_corpus, tmp_path):
    arguments = ["--question", "What does await do?", "--expand", "0.25", "--k", "8", "--plot-tokens", "128,192"]
    result = run(*SMALL, *arguments, "--output-dir", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "await#1" in result.output and "was trained for" in result.output and "speed-up" in result.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["settings"]["k"] == 8 and figures["chunks_expanded"] == round(0.25 * figures["chunks"])
    table = figures["table"]
    assert table["full"]["rows"] == 160 == table["own_full"]["rows"]
    assert table["cached"]["rows"] == table["encoded"]["rows"] < 160
    for reading in table.values():
        # Keys and values of 30 layers, 3 heads with head_dim 64, float32.
        assert reading["kv_cache_bytes"] == reading["rows"] * 2 * 30 * 3 * 64 * 4
        assert reading["seconds_to_first_token"][0] > 0 and reading["seconds_per_token"] > 0
    assert list(figures["plot"]) == ["128", "192"]
    assert (tmp_path / "ttft.png").read_bytes().startswith(b"\x89PNG")


def test_demo_with_few_passages(small_corpus, tmp_path):
    result = run(*SMALL, "--passages", "1", "--question", "What does await do?", "--output-dir", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "figures.json").read_text())["passages"] == ["await#1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--question", "  "], "--question: is empty"),
        (["--expand", "1.5"], "--expand: got 1.5, needs a fraction from 0 to 1"),
        (["--k", "0"], "--k: got 0, needs 1 or more"),
        (["--passages", "0"], "--passages: got 0"),
        (["--plot-tokens", "12,x"], "--plot-tokens: got '12,x'"),
        (["--context-tokens", "20"], "--context-tokens: got 20, needs more than"),
        (
            ["--context-tokens", "8190"],
            "the full text and 4 new tokens are 2 over the decoder's window",
        ),
        (["--plot-tokens", "9000"], "--plot-tokens: the full text is 808 over the decoder's window of 8192"),
        (["--plot-tokens", "9000", "--k", "1"], "808 over the decoder's window of 8192; k = 2 would fit"),
    ],
)
def test_bad_input_is_one_clear_line(unranked_corpus, tmp_path, arguments, message):
    result = run(*SMALL, "--output-dir", str(tmp_path), *arguments)
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.output


def test_unwritable_cache(small_corpus, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("REFRAG_CACHE", str(tmp_path / "file"))
    result = run(*SMALL, "--output-dir", str(tmp_path))
    assert result.exit_code == 2 and "cache folder" in result.stderr and "REFRAG_CACHE" in result.stderr


def test_as_a_program(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "refrag", "demo", *SMALL, "--output-dir", "out"],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "Wrote out/figures.json" in result.stdout and os.listdir(tmp_path / "out") == ["figures.json"]


def test_help_needs_no_torch():
    program = "import sys; from refrag.cli import app; app(['demo', '--help'], standalone_mode=False)"
    program += "; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert "--context-tokens" in result.stdout and result.stdout.endswith("False\n"), result.stderr
