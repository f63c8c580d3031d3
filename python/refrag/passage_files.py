"""Passages from files and standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from refrag.prompt import Passage


def read_passages(files: Sequence[Path]) -> list[Passage]:
    """Read passages in the files' order.

    A ``.jsonl`` file holds one on each line, as ``{"text": ..., "id": ...}`` (the id may be missing); any other file is
    one passage, named after the file. ``-`` is standard input: JSON lines where it begins with a brace, else one
    passage.

    Parameters
    ----------
    files : sequence of Path

    Raises
    ------
    ValueError
        If a line is not such an object, a text is empty, or a file isn't UTF-8; names the file and the line.
    OSError
        If a file can't be read.
    """
    passages: list[Passage] = []
    for file in files:
        standard_input = str(file) == "-"
        name = "standard input" if standard_input else str(file)
        try:
            text = sys.stdin.read() if standard_input else file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: is not UTF-8 text (byte {error.start})") from None
        if not text.strip():
            raise ValueError(f"{name}: has no text")
        if file.suffix == ".jsonl" or (standard_input and text.lstrip().startswith("{")):
            lines = enumerate(text.split("\n"), 1)
            passages += [_from_json(line, f"{name}, line {number}") for number, line in lines if line.strip()]
        else:
            passages.append(Passage(text, None if standard_input else file.name))
    return passages


def _from_json(line: str, where: str) -> Passage:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: is not JSON ({error})") from None
    text = fields.get("text") if isinstance(fields, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{where}: needs an object with a "text" that is not empty')
    return Passage(text, None if fields.get("id") is None else str(fields["id"]))
