"""Reads corpora larger than memory in slices: JSON lines, Parquet and folders of text.

A slice contains the location of its passages, not their text, so it can be sent to another process and read there.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from refrag.model.inputs import Passage, half_surrogate

JSON_SUFFIXES = (".jsonl", ".ndjson")


class PassageError(ValueError):
    """Raised if a record isn't a valid passage; the message states its location and what it needs."""


@dataclasses.dataclass(frozen=True)
class Fields:
    """Names of the fields that contain a record's text and id.

    Attributes
    ----------
    text : str
    id : str or None
        None uses the field "id" of records that have it. A field named here must be in every record.
    """

    text: str = "text"
    id: str | None = None


class Slice(Protocol):
    """A part of a corpus.

    Attributes
    ----------
    count : int
        Number of records.
    """

    @property
    def count(self) -> int: ...

    def read(self, fields: Fields) -> Iterator[Passage | PassageError]:
        """Yield the passages in order, with an error in place of each invalid record."""
        ...


@dataclasses.dataclass(frozen=True)
class JsonLines:
    """``count`` JSON lines of a file, from byte ``start``, which begins line ``line``. Blank lines aren't records."""

    path: Path
    start: int
    line: int
    count: int

    def read(self, fields: Fields) -> Iterator[Passage | PassageError]:
        with open(self.path, "rb") as file:
            file.seek(self.start)
            yield from itertools.islice(read_lines(file, fields, str(self.path), self.line), self.count)


@dataclasses.dataclass(frozen=True)
class ParquetRows:
    """A row group of a Parquet file; ``row`` is the index of its first row in the file."""

    path: Path
    group: int
    row: int
    count: int

    def read(self, fields: Fields) -> Iterator[Passage | PassageError]:
        file = _parquet(self.path)
        columns = [name for name in (fields.text, fields.id or "id") if name in file.schema_arrow.names]
        number = self.row
        for batch in file.iter_batches(batch_size=1024, row_groups=[self.group], columns=columns):
            for record in batch.to_pylist():
                yield _from_record(record, fields, f"{self.path}: row {number}", file.schema_arrow.names)
                number += 1


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """Text files in a folder, each a passage; their ids are their paths relative to the folder."""

    folder: Path
    names: tuple[str, ...]

    @property
    def count(self) -> int:
        return len(self.names)

    def read(self, fields: Fields) -> Iterator[Passage | PassageError]:
        for name in self.names:
            path = self.folder / name
            yield read_text(path.read_bytes(), str(path), name)


def read_lines(lines: Iterable[bytes], fields: Fields, name: str, first: int = 1) -> Iterator[Passage | PassageError]:
    """Yield the passages of JSON lines in order, with an error in place of each invalid line.

    Parameters
    ----------
    lines : iterable of bytes
        UTF-8 lines of a binary file, split at line feeds only. Blank lines aren't records.
    fields : Fields
    name : str
        Name of the file for error messages.
    first : int
        Number of the first line.
    """
    for number, line in enumerate(lines, first):
        if line.strip():
            yield _from_line(line, fields, f"{name}:{number}")


def read_text(content: bytes, name: str, id: str | None = None) -> Passage | PassageError:
    """Return a whole file as one passage, or an error. Removes a byte order mark, but keeps line endings.

    Parameters
    ----------
    content : bytes
        UTF-8.
    name : str
        Name of the file for error messages.
    id : str, optional
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return PassageError(f"{name}: is not UTF-8 (byte {error.start})")
    return Passage(text, id) if text.strip() else PassageError(f"{name}: has no text")


def is_corpus(path: Path) -> bool:
    """Return whether ``slices`` supports a path: JSON lines, Parquet or a folder."""
    return path.suffix in (*JSON_SUFFIXES, ".parquet") or path.is_dir()


def slices(paths: Sequence[Path], count: int, *, pattern: str = "*.txt") -> Iterator[Slice]:
    """Yield the slices of files and folders, in order.

    Parameters
    ----------
    paths : sequence of Path
        Files of JSON lines (.jsonl, .ndjson) or Parquet (.parquet), and folders of text files.
    count : int
        Maximum number of records in a slice. Parquet files are sliced by row group instead.
    pattern : str
        Pattern for the names of text files in a folder and its subfolders.

    Raises
    ------
    ValueError
        If a file has an unsupported type, a folder has no matching files, or pyarrow is missing. The message names it.
    OSError
        If a path doesn't exist or can't be read.
    """
    for path in paths:
        if path.is_dir():
            yield from _slices_of_folder(path, count, pattern)
        elif path.suffix in JSON_SUFFIXES:
            yield from _slices_of_lines(path, count)
        elif path.suffix == ".parquet":
            row = 0
            metadata = _parquet(path).metadata
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                yield ParquetRows(path, group, row, rows)
                row += rows
        elif not path.exists():
            raise FileNotFoundError(f"{path}: does not exist")
        else:
            raise ValueError(f"{path}: got {path.suffix or 'no suffix'}, needs .jsonl, .ndjson, .parquet or a folder")


def _slices_of_lines(path: Path, count: int) -> Iterator[JsonLines]:
    start = offset = records = 0
    first = 1
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if records == count:
                yield JsonLines(path, start, first, records)
                start, first, records = offset, number, 0
            offset += len(line)
            records += bool(line.strip())
    if records:
        yield JsonLines(path, start, first, records)


def _slices_of_folder(folder: Path, count: int, pattern: str) -> Iterator[TextFiles]:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob(pattern) if path.is_file())
    if not names:
        raise ValueError(f"{folder}: has no files that match {pattern}; list files of other types one by one")
    for first in range(0, len(names), count):
        yield TextFiles(folder, tuple(names[first : first + count]))


def _parquet(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: Parquet needs pyarrow: pip install 'refrag-kernels[parquet]'") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: is not Parquet ({error})") from None


def _from_line(line: bytes, fields: Fields, where: str) -> Passage | PassageError:
    try:
        record = json.loads(line.rstrip(b"\r\n").decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return PassageError(f"{where}: is not UTF-8 (byte {error.start})")
    except json.JSONDecodeError as error:
        return PassageError(f"{where}: is not JSON ({error.msg}, column {error.colno})")
    if not isinstance(record, dict):
        return PassageError(f"{where}: is {_kind(record)}, needs an object")
    return _from_record(record, fields, where, list(record))


def _from_record(record: dict[str, Any], fields: Fields, where: str, names: Sequence[str]) -> Passage | PassageError:
    for name in (fields.text, fields.id):
        if name is not None and name not in record:
            return PassageError(f"{where}: has no field {name!r}, only {', '.join(names) or 'none'}")
    text, id = record[fields.text], record.get(fields.id or "id")
    if not isinstance(text, str):
        return PassageError(f"{where}: {fields.text} is {_kind(text)}, needs a string")
    if not text.strip():
        return PassageError(f"{where}: {fields.text} is empty")
    if half_surrogate(text) is not None:
        return PassageError(f"{where}: {fields.text} contains half a surrogate pair, which isn't a character")
    if id is None and fields.id is None:
        return Passage(text)
    if not isinstance(id, (str, int)) or isinstance(id, bool) or id == "":
        return PassageError(f"{where}: {fields.id or 'id'} is {_kind(id)}, needs a string or a whole number")
    return Passage(text, str(id))


def _kind(value: Any) -> str:
    if value is None or value == "":
        return "null" if value is None else "empty"
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"of type {type(value).__name__}")
