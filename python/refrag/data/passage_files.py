"""Reads the passages of a prompt from files and standard input, in the same way as `refrag encode`."""

from __future__ import annotations

import codecs
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from refrag.data.sources import Fields, is_corpus, read_lines, read_text, slices
from refrag.model.inputs import Passage

_SLICE = 4096  # records; the result doesn't depend on it


def read_passages(files: Sequence[Path]) -> list[Passage]:
    """Read passages in the order of the files.

    JSON lines (``.jsonl``, ``.ndjson``), Parquet and folders of text are read by ``sources.slices``, so that a store
    filled from them contains exactly these passages. Any other file is one passage, named after the file. ``-`` is
    standard input: JSON lines if it begins with a brace, otherwise one passage.

    Parameters
    ----------
    files : sequence of Path

    Raises
    ------
    PassageError
        If a record isn't a valid passage, or a file has no text or isn't UTF-8. The message names the file and line.
    ValueError
        As for ``sources.slices``.
    OSError
        If a file can't be read.
    """
    passages: list[Passage] = []
    for file in files:
        if str(file) == "-":
            name = "standard input"
            content = sys.stdin.buffer.read()
            is_lines = content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{")
            records = read_lines(io.BytesIO(content), Fields(), name) if is_lines else [read_text(content, name)]
        elif is_corpus(file):
            name = str(file)
            records = (record for part in slices([file], _SLICE) for record in part.read(Fields()))
        else:
            name = str(file)
            records = [read_text(file.read_bytes(), name, file.name)]
        count = len(passages)
        for record in records:
            if not isinstance(record, Passage):
                raise record
            passages.append(record)
        if len(passages) == count:
            raise ValueError(f"{name}: has no text")
    return passages
