"""Token files: written in pieces, read with only numpy and the standard library."""

import json
import subprocess
import sys

import numpy as np
import pytest
from refrag.cli import app
from refrag.corpus.tokenizing import tokenize_corpus
from refrag.training.token_files import (
    TokenFileError,
    TokenSet,
    load_tokens,
    read_header,
    tokenizer_hash,
    write_tokens,
)
from typer.testing import CliRunner


def token_set(documents=40, split="train", tokenizer="a" * 64):
    random = np.random.default_rng(7)
    lengths = random.integers(1, 9000, documents).astype(np.uint32)
    tokens = random.integers(0, 1 << 16, int(lengths.sum())).astype(np.uint16)
    return TokenSet(tokens, lengths, [f"source-{number % 3}" for number in range(documents)], split, tokenizer)


@pytest.mark.parametrize("piece_bytes", [None, 200_000])
def test_what_is_written_is_read(tmp_path, piece_bytes):
    content = token_set()
    files = write_tokens(tmp_path / "train.tok", content, piece_bytes=piece_bytes)
    names = ["train.tok"] if piece_bytes is None else [f"train-{n}.tok" for n in range(1, len(files) + 1)]
    assert [file.name for file in files] == names == sorted(path.name for path in tmp_path.iterdir())
    # Random tokens can't be compressed, but the limit still holds.
    assert piece_bytes is None or (len(files) > 2 and max(file.stat().st_size for file in files) <= piece_bytes)
    tokens, offsets, sources = load_tokens(files, training=True, tokenizer="a" * 64)
    assert (tokens.dtype, offsets.dtype) == (np.uint16, np.int64)
    np.testing.assert_array_equal(tokens, content.tokens)
    np.testing.assert_array_equal(np.diff(offsets), content.lengths)
    assert sources == content.sources and offsets[0] == 0
    headers = [read_header(file) for file in files]
    assert sum(header["tokens"] for header in headers) == len(tokens)
    by_source = {name: sum(header["tokens_of_source"].get(name, 0) for header in headers) for name in set(sources)}
    assert by_source == {name: int(content.lengths[number::3].sum()) for number, name in enumerate(sources[:3])}


def test_reading_needs_numpy_alone(tmp_path):
    files = write_tokens(tmp_path / "train.tok", token_set(3))
    program = "import sys; sys.path = sys.argv[2:]; from refrag.training.token_files import load_tokens\n"
    program += "assert len(load_tokens([sys.argv[1]])[2]) == 3\n"
    program += "print(sorted({'torch', 'transformers', 'datasets', 'rich'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", program, *map(str, files), *sys.path], capture_output=True, text=True
    )
    assert result.stdout == "[]\n", result.stderr


def test_bad_files_are_named(tmp_path):
    files = write_tokens(tmp_path / "train.tok", token_set(), piece_bytes=200_000)
    held_out = write_tokens(tmp_path / "heldout-perl.tok", token_set(4, "heldout-perl"))
    other = write_tokens(tmp_path / "other.tok", token_set(4, tokenizer="b" * 64))
    assert read_header(held_out[0])["held_out"] and len(load_tokens(held_out)[2]) == 4
    (tmp_path / "text.tok").write_text("text\n")
    (tmp_path / "later.tok").write_text(json.dumps({"format": "refrag tokens 2"}) + "\n")
    damaged = bytearray(files[0].read_bytes())
    (tmp_path / "short.tok").write_bytes(damaged[:-1000])
    header, _, arrays = bytes(damaged).partition(b"\n")
    (tmp_path / "foreign.tok").write_bytes(header.replace(b'"sha256": "', b'"sha256": "x') + b"\n" + arrays)
    cases = [
        ([], {}, "paths: got none"),
        (files[1:], {}, r"train-2.tok: is one of \d+ pieces; \[1\] missing"),
        ([*files, files[0]], {}, "train-1.tok: is given twice"),
        (
            [*files, *held_out],
            {"training": True},
            r"heldout-perl.tok: is held out \(heldout-perl\) and must not be trained on",
        ),
        ([*files, *other], {}, "other.tok: has tokens of tokenizer bbbbbbbbbbbb, needs aaaaaaaaaaaa"),
        (files, {"tokenizer": "c" * 64}, "train-1.tok: has tokens of tokenizer aaaaaaaaaaaa, needs cccccccccccc"),
        ([tmp_path / "text.tok"], {}, "text.tok: is not a token file"),
        ([tmp_path / "later.tok"], {}, "later.tok: has format 'refrag tokens 2', needs 'refrag tokens 1'"),
        ([tmp_path / "short.tok"], {}, "short.tok: is damaged"),
        ([tmp_path / "foreign.tok"], {}, "foreign.tok: is damaged .the hash in its header"),
    ]
    for paths, options, message in cases:
        with pytest.raises(TokenFileError, match=message):
            load_tokens(paths, **options)
    with pytest.raises(ValueError, match="piece_bytes: got 70000, needs more for a document of"):
        write_tokens(tmp_path / "train.tok", token_set(), piece_bytes=70_000)
    with pytest.raises(ValueError, match="content: needs documents of one token or more"):
        write_tokens(tmp_path / "empty.tok", TokenSet(np.zeros(0, np.uint16), np.zeros(0, np.uint32), [], "train", ""))


def test_a_broken_off_run_leaves_nothing(tmp_path, monkeypatch):
    def broken(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("refrag.training.token_files.os.replace", broken)
    with pytest.raises(KeyboardInterrupt):
        write_tokens(tmp_path / "train.tok", token_set(3))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    # One source has ten times the text of the others; "<|im_end|>" is ordinary text.
    sources = {"long": 100, "short": 10, "other": 10}
    for name in ("train", "valid", "heldout-perl"):
        with open(folder / f"{name}.jsonl", "w") as file:
            for source, count in sources.items():
                for number in range(count):
                    text = f"{source} {number} of {name}: the river rose and fell again. <|im_end|>"
                    file.write(json.dumps({"id": f"{source}/{number}", "text": text, "source": source}) + "\n")
    return folder


def test_a_corpus_becomes_token_files(corpus, tmp_path, tokenizer):
    options = {"tokens": 1200, "other_tokens": 90, "held_out_tokens": 60}
    files = tokenize_corpus(corpus, tmp_path / "tokens", tokenizer, **options)
    assert [file.name for file in files] == ["train.tok", "heldout-perl.tok", "valid.tok"]
    tokens, offsets, sources = load_tokens(files[:1], training=True, tokenizer=tokenizer_hash(tokenizer))
    text = tokenizer.decode(tokens[offsets[0] : offsets[1]])
    assert text == "long 0 of train: the river rose and fell again. <|im_end|>"
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in tokens
    counts = {
        name: sum(int(n) for n, source in zip(np.diff(offsets), sources) if source == name) for name in set(sources)
    }
    assert counts["short"] < counts["long"] <= 1200 - 2 * counts["short"] and 1190 <= len(tokens) <= 1200
    assert 85 <= read_header(files[2])["tokens"] <= 90 and read_header(files[1])["tokens"] == 60
    again = tokenize_corpus(corpus, tmp_path / "again", tokenizer, **options)
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in files]


def test_the_command(corpus, tmp_path):
    result = CliRunner().invoke(
        app, ["data", "tokens", str(corpus), "--output", str(tmp_path / "t"), "--piece-mib", "1"]
    )
    assert result.exit_code == 0, result.output
    assert "train.tok" in result.output and "120 documents" in result.output
    for arguments, message in (
        ([str(tmp_path)], "has no train.jsonl, needs the output of `refrag data corpus`"),
        ([str(corpus), "--tokens", "99999"], "tokens: got 99,999, the sources have"),
    ):
        result = CliRunner().invoke(app, ["data", "tokens", *arguments, "--output", str(tmp_path / "bad")])
        assert result.exit_code == 2 and message in " ".join(result.stderr.split())
    assert not (tmp_path / "bad").exists()
