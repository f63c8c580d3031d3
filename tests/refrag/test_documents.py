"""Documents: all sources, no duplicates, no window across documents, no document in both splits."""

import json

import numpy as np
import pytest
from refrag.data.documents import Documents, prefix_ids, read_documents, split_documents

TEXTS = ["The bridge of Orla was built in 1871.\n\nIt stands.", "Ünïcode, \U0001f600 and\ttabs.", "A third one."]


@pytest.fixture
def home(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def contents(documents, tokenizer):
    return {
        tokenizer.decode(documents.token_ids[start:end], clean_up_tokenization_spaces=False)
        for start, end in zip(documents.offsets[:-1], documents.offsets[1:])
    }


def test_every_kind_of_source(home, tokenizer):
    folder = home / "folder"
    (folder / "below").mkdir(parents=True)
    (folder / "one.txt").write_text(TEXTS[0])
    (folder / "below" / "two.md").write_text(TEXTS[1])
    (folder / "ignored.py").write_text("nothing")
    lines = home / "lines.jsonl"
    lines.write_text("".join(json.dumps({"body": text, "other": 1}) + "\n" for text in [TEXTS[0], TEXTS[2]]))
    table = home / "table.parquet"
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": [TEXTS[2], "And a fourth."]}), table)
    documents = read_documents([folder, lines, table], tokenizer, column="body")
    assert contents(documents, tokenizer) == {*TEXTS, "And a fourth."}
    assert len(documents) == 4  # duplicates are removed


@pytest.mark.parametrize(
    ("source", "message"),
    [("missing.txt", "does not exist"), ("empty", r"\.txt"), ("columns.jsonl", r"columns\.jsonl has: a")],
)
def test_bad_sources(home, tokenizer, source, message):
    (home / "empty").mkdir()
    (home / "columns.jsonl").write_text('{"a": "b"}\n')
    with pytest.raises(ValueError, match=message):
        read_documents([home / source], tokenizer, column="c")
    with pytest.raises(ValueError, match="sources: got none"):
        read_documents([], tokenizer)


def test_a_file_that_is_not_utf_8_is_named(home, tokenizer):
    folder = home / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text(TEXTS[0])
    (folder / "b.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"folder/b\.txt can't be read: 'utf-8' codec can't decode byte 0xe9"):
        read_documents([folder], tokenizer)


def test_windows_are_all_runs_within_documents():
    documents = Documents(np.arange(20), np.array([0, 3, 3, 10, 12, 20]))
    windows = documents.windows(4)
    assert [windows[index].token_ids for index in range(len(windows))] == [
        list(range(start, start + 4)) for first, end in [(3, 10), (12, 20)] for start in range(first, end - 3)
    ]
    with pytest.raises(IndexError):
        windows[len(windows)]
    with pytest.raises(ValueError, match="the longest has 8 tokens, needs 9"):
        documents.windows(9)
    drawn = [tuple(windows.draw(3, index).token_ids) for index in range(300)]
    assert len(set(drawn)) == len(windows)  # each is drawn
    assert (
        drawn
        == [tuple(windows.draw(3, index).token_ids) for index in range(300)]
        != [tuple(windows.draw(4, index).token_ids) for index in range(300)]
    )


def test_the_split_of_a_document_is_stable():
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, 1000, 50) for _ in range(200)]

    def of(texts):
        return Documents(np.concatenate(texts), np.arange(0, 50 * len(texts) + 1, 50))

    train, test = split_documents(of(texts), 0.25)
    assert len(train) + len(test) == 200 and 30 < len(test) < 70
    fewer = split_documents(of(texts[::2]), 0.25)[1]
    assert set(map(tuple, fewer.token_ids.reshape(-1, 50))) <= set(map(tuple, test.token_ids.reshape(-1, 50)))
    assert not set(map(tuple, train.token_ids.reshape(-1, 50))) & set(map(tuple, test.token_ids.reshape(-1, 50)))
    with pytest.raises(ValueError, match="held_out"):
        split_documents(of(texts), 1.0)


def test_a_slot_is_never_first(tokenizer):
    assert prefix_ids(tokenizer) == [tokenizer.bos_token_id]
