"""Passages from files: slices cover the file, and errors state the location."""

import io
import json
import pickle
import sys

import pytest
from refrag import Passage
from refrag.commands.train import read_questions
from refrag.data.passage_files import read_passages
from refrag.data.sources import Fields, PassageError, slices

RECORDS = [{"text": f"Passage {number},\nwith ünïcödé.", "id": f"p{number}", "more": number} for number in range(23)]
PASSAGES = [Passage(record["text"], record["id"]) for record in RECORDS]


def read(paths, count, fields=None, **options):
    """Read pickled slices in reverse order: each must contain its own location."""
    parts = pickle.loads(pickle.dumps(list(slices(paths, count, **options))))
    read = [list(part.read(fields or Fields())) for part in reversed(parts)]
    assert [len(own) for own in reversed(read)] == [part.count for part in parts]
    return [one for own in reversed(read) for one in own]


def write_lines(path, lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines))
    return path


def errors(read):
    assert all(isinstance(one, PassageError) for one in read)
    return [str(one) for one in read]


@pytest.mark.parametrize("count", [1, 4, 23, 100])
def test_json_lines(tmp_path, count):
    lines = [json.dumps(record, ensure_ascii=index % 2 == 0) for index, record in enumerate(RECORDS)]
    plain = write_lines(tmp_path / "a.jsonl", lines)
    # A byte order mark, Windows line endings, blank lines, no newline at the end.
    ends = [f"{line}\r\n \t" for line in lines[1:9]]
    odd = write_lines(tmp_path / "b.ndjson", [b"\xef\xbb\xbf", lines[0], *ends, "\r", lines[9].encode()])
    assert read([plain], count) == PASSAGES
    assert read([odd, plain], count) == PASSAGES[:10] + PASSAGES
    assert read([write_lines(tmp_path / "empty.jsonl", ["", " "])], count) == []


def test_fields_by_name(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ['{"body": "x", "number": 7}', '{"body": "y", "id": "z", "number": "8"}'])
    assert read([path], 9, Fields("body")) == [Passage("x"), Passage("y", "z")]
    assert read([path], 9, Fields("body", "number")) == [Passage("x", "7"), Passage("y", "8")]


def test_bad_lines_are_named(tmp_path):
    cases = {
        '{"text": "x"': "is not JSON (Expecting ',' delimiter, column 13)",
        '["x"]': "is a list, needs an object",
        '{"body": "x", "title": "y"}': "has no field 'text', only body, title",
        "{}": "has no field 'text', only none",
        '{"text": 3}': "text is a number, needs a string",
        '{"text": null}': "text is null, needs a string",
        '{"text": " \\n"}': "text is empty",
        '{"text": "\\ud800"}': "text contains half a surrogate pair, which isn't a character",
        '{"text": "x", "id": 1.5}': "id is a number, needs a string or a whole number",
        '{"text": "x", "id": ""}': "id is empty, needs a string or a whole number",
        '{"text": "x", "id": true}': "id is true or false, needs a string or a whole number",
    }
    path = write_lines(tmp_path / "bad.jsonl", ["", *cases, b'{"text": "\xff"}\n'])
    expected = [f"{path}:{number}: {message}" for number, message in enumerate(cases.values(), 2)]
    assert errors(read([path], 5)) == [*expected, f"{path}:{len(cases) + 2}: is not UTF-8 (byte 10)"]
    path = write_lines(tmp_path / "ids.jsonl", ['{"text": "x", "id": null}', '{"text": "x"}'])
    assert read([path], 5) == [Passage("x"), Passage("x")]
    assert errors(read([path], 5, Fields(id="id"))) == [
        f"{path}:1: id is null, needs a string or a whole number", f"{path}:2: has no field 'id', only text",
    ]  # fmt: skip


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path, row_group_size=7)
    assert len(list(slices([path], 100))) == 4
    assert read([path], 5) == PASSAGES
    assert read([path], 5, Fields(id="more"))[3] == Passage(PASSAGES[3].text, "3")
    assert errors(read([path], 5, Fields("body")))[9] == f"{path}: row 9: has no field 'body', only text, id, more"
    rows = [{"text": "x"}, {"text": None}, {"text": " "}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    read_rows = read([tmp_path / "b.parquet"], 5)
    assert read_rows[0] == Passage("x")
    assert errors(read_rows[1:]) == [f"{tmp_path}/b.parquet: row 1: text is null, needs a string",
                                     f"{tmp_path}/b.parquet: row 2: text is empty"]  # fmt: skip
    (tmp_path / "c.parquet").write_text("no")
    with pytest.raises(ValueError, match="c.parquet: is not Parquet"):
        list(slices([tmp_path / "c.parquet"], 5))


def test_a_folder_of_text(tmp_path):
    (tmp_path / "deep").mkdir()
    for name, content in {"b.txt": b"\xef\xbb\xbfB", "a.txt": "Ä".encode(), "deep/c.txt": b"C\n", "d.md": b"D"}.items():
        (tmp_path / name).write_bytes(content)
    expected = [Passage("Ä", "a.txt"), Passage("B", "b.txt"), Passage("C\n", "deep/c.txt")]
    for count in (1, 2, 9):
        assert read([tmp_path], count) == expected
    assert read([tmp_path], 9, pattern="*.md") == [Passage("D", "d.md")]
    (tmp_path / "b.txt").write_bytes(b"abc\xff")
    (tmp_path / "a.txt").write_bytes(b" ")
    assert errors(read([tmp_path], 9)[:2]) == [
        f"{tmp_path}/a.txt: has no text",
        f"{tmp_path}/b.txt: is not UTF-8 (byte 3)",
    ]


def test_unsupported_paths_are_refused(tmp_path):
    (tmp_path / "a.csv").touch()
    for name, kind, message in [
        ("a.csv", ValueError, r"a.csv: got .csv, needs .jsonl, .ndjson, .parquet or a folder"),
        ("none.txt", FileNotFoundError, "none.txt: does not exist"),
        ("none.jsonl", FileNotFoundError, "none.jsonl"),
        ("", ValueError, r"has no files that match \*.txt"),
    ]:
        with pytest.raises(kind, match=message):
            list(slices([tmp_path / name], 5))


ODD_LINES = {
    "windows": b'{"text": "a\\r\\nb"}\r\n \r\n{"text": "c", "id": 3}\r\n',
    "marked": b'\xef\xbb\xbf{"text": "a", "id": "x"}\n\xef\xbb\xbf{"text": "b", "id": null}',
    "separators": '{"text": "a\u2028b\x85c"}\n{"text": "\\ufeffe"}\n'.encode(),
    "carriage returns": b'{"text":\r"a"}\r\n{"text": "b\\rc"}\r',
}


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "-"])
@pytest.mark.parametrize("content", ODD_LINES.values(), ids=ODD_LINES)
def test_prompts_read_the_passages_that_encode_reads(tmp_path, monkeypatch, content, suffix):
    """A store finds a passage by its text: a file must give the same one to `refrag generate` as to `refrag encode`."""
    path = tmp_path / f"odd.{suffix if suffix != '-' else 'jsonl'}"
    path.write_bytes(content)
    encoded = read([path], 1)
    assert len(encoded) == 2 and all(isinstance(one, Passage) for one in encoded)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert read_passages([type(path)("-") if suffix == "-" else path]) == encoded


@pytest.mark.parametrize("line", [b'{"text": "x", "id": ""}', b'{"text": "\\ud800"}', b'{"text": "x", "id": true}'])
def test_prompts_refuse_what_encode_refuses(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(line)
    (refused,) = errors(read([path], 1))
    with pytest.raises(PassageError) as error:
        read_passages([path])
    assert str(error.value) == refused


def test_prompts_read_the_text_files_that_encode_reads(tmp_path):
    contents = {"cr.txt": b"a\rb\r", "crlf.txt": b"a\r\nb\r\n", "mark.txt": b"\xef\xbb\xbfa\n", "two.txt": b"a\n\nb"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    encoded = read([tmp_path], 9)
    assert [one.text.encode() for one in encoded] == [b"a\rb\r", b"a\r\nb\r\n", b"a\n", b"a\n\nb"]
    assert read_passages([tmp_path / name for name in contents]) == encoded == read_passages([tmp_path])


def test_a_prompt_reads_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet", row_group_size=7)
    assert read_passages([tmp_path / "a.parquet"]) == PASSAGES


def test_questions_are_split_at_newlines_only(tmp_path):
    path = tmp_path / "questions.jsonl"
    lines = [{"question": "a\u2028b\x85c"}, {"question": "d"}]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines).encode())
    assert read_questions(path) == lines
    path.write_bytes(b'{"question": "\xff"}')
    with pytest.raises(ValueError, match=r"questions.jsonl: is not UTF-8 \(byte 14\)"):
        read_questions(path)
