"""Extracts plain text from a package's files: HTML, manual pages, Info files and text, optionally compressed."""

from __future__ import annotations

import dataclasses
import gzip
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_HTML = (".html", ".htm", ".xhtml")
_TEXT = (".txt", ".md", ".rst", ".adoc")
_MAN = re.compile(r"(?:^|/)man/man\d\w*/[^/]+\.\d\w*$")  # English pages only: others are below man/LANGUAGE/
_INFO = re.compile(r"(?:^|/)info/[^/]+\.info(-\d+)?$")
_LANGUAGE = re.compile(r"[a-z]{2,3}([-_][A-Z]{2}|-[a-z]{2})?")
# Indexes, search pages, sources of the same text and program listings.
_SKIPPED = re.compile(
    r"(?:^|/)(_sources|_modules|_static)/|(?:^|/)(copyright|changelog[^/]*|news[^/]*|readme\.debian|"
    r"(gen|py-mod)index[^/]*|index-[\w-]+|search|[^/]*-(all|members|index))(\.\w+)?$",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file with text.

    Attributes
    ----------
    path : Path
    name : str
        The path within the package, which is also the document's name.
    kind : str
        html, man, info or text.
    """

    path: Path
    name: str
    kind: str


def text_files(folder: Path) -> list[TextFile]:
    """Return the documentation files below a folder, ordered by name.

    Omits plain text if there are other files, since it is usually the source of the same pages. Omits folders of other
    languages next to an English one.
    """
    found = []
    for path in _english(folder):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            kind = _kind(name.removesuffix(".gz"))
            if kind is not None:
                found.append(TextFile(path, name, kind))
    formatted = [file for file in found if file.kind != "text"]
    return formatted or found


def read_text(file: TextFile) -> str:
    """Return a file's text, or an empty string if it can't be read.

    Raises
    ------
    FileNotFoundError
        If ``mandoc`` is missing, for a manual page.
    ModuleNotFoundError
        If ``resiliparse`` is missing, for HTML and manual pages.
    """
    try:
        content = gzip.decompress(file.path.read_bytes()) if file.path.suffix == ".gz" else file.path.read_bytes()
    except (OSError, EOFError):
        return ""
    if file.kind == "html":
        return html_text(content)
    if file.kind == "man":
        return html_text(manual_html(content), main_content=False)
    text = content.decode("utf-8", errors="replace")
    if file.kind == "info":
        # A node begins with a line that contains only the unit separator, followed by a line of links.
        text = re.sub(r"\x1f\n(File: .*\n|Tag Table:[\s\S]*)?", "\n", text)
        text = re.sub(r"^\* Menu:\n(?:\n|\*.*\n|\s+.*\n)*", "", text, flags=re.MULTILINE)
    return _tidy(text)


def html_text(content: bytes, *, main_content: bool = True) -> str:
    """Return the text of an HTML page, without navigation if ``main_content`` is set."""
    tree = parse_html(content)
    text = _resiliparse().extract.html2text.extract_plain_text(tree, main_content=main_content, alt_texts=False)
    return _tidy(text)


def parse_html(content: bytes) -> Any:
    """Parse an HTML page into resiliparse's tree, detecting its encoding."""
    html = _resiliparse().parse
    return html.html.HTMLTree.parse_from_bytes(content, html.encoding.detect_encoding(content))


def manual_html(content: bytes) -> bytes:
    """Convert a manual page to HTML with ``mandoc``.

    Raises
    ------
    FileNotFoundError
        If ``mandoc`` is missing.
    """
    program = shutil.which("mandoc")
    if program is None:
        raise FileNotFoundError("mandoc: not on PATH, needed to read manual pages (Debian: apt-get install mandoc)")
    html = subprocess.run([program, "-T", "html", "-O", "fragment"], input=content, capture_output=True).stdout
    return re.sub(rb'<table class="(head|foot)">.*?</table>', b"", html, flags=re.DOTALL)  # name, date and section


def needs(files: Iterable[TextFile]) -> None:
    """Check that the converters of these files are installed, before hours of work.

    Raises
    ------
    FileNotFoundError, ModuleNotFoundError
        As ``read_text``.
    """
    kinds = {file.kind for file in files}
    if kinds & {"html", "man"}:
        _resiliparse()
    if "man" in kinds:
        manual_html(b"")


def _english(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder in order of name, without translations."""
    entries = sorted(folder.iterdir())
    languages = [entry for entry in entries if entry.is_dir() and _LANGUAGE.fullmatch(entry.name)]
    english = [entry for entry in languages if entry.name[:2] == "en" and not entry.name[2:3].isalpha()]
    for entry in entries:
        if entry.is_symlink() or (english and entry in languages and entry not in english):
            continue
        if entry.is_dir():
            yield from _english(entry)
        else:
            yield entry


def _kind(name: str) -> str | None:
    if _SKIPPED.search(name):
        return None
    if _MAN.search(name):
        return "man"
    if _INFO.search(name):
        return "info"
    suffix = Path(name).suffix.lower()
    return "html" if suffix in _HTML else "text" if suffix in _TEXT else None


def _tidy(text: str) -> str:
    text = re.sub(r"[ \t\xa0]+$", "", text.replace("\r\n", "\n"), flags=re.MULTILINE).replace("\N{PILCROW SIGN}", "")
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _resiliparse() -> Any:
    try:
        import resiliparse
        import resiliparse.extract.html2text
        import resiliparse.parse.encoding
        import resiliparse.parse.html
    except ImportError:
        raise ModuleNotFoundError("reading HTML needs resiliparse: pip install 'refrag-kernels[data]'") from None
    return resiliparse
