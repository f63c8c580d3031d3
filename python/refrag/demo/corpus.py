"""The demo's corpus: the Python language reference, which ships with Python itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from pydoc_data.topics import topics

from refrag.model.inputs import Passage

PASSAGE_WORDS = 120  # about 200 tokens of this text: a dozen chunks at k = 16


def python_reference() -> list[Passage]:
    """Return the reference as passages of whole paragraphs, with ids such as "with#3".

    Many topics contain the same paragraphs. A paragraph is kept only in the shortest topic that contains it, which is
    usually the one about its subject.

    Examples
    --------
    >>> passages = python_reference()
    >>> next(passage.text for passage in passages if passage.id == "lambda#1")[:7]
    'Lambdas'
    """
    seen: set[str] = set()
    passages = []
    for topic, text in sorted(topics.items(), key=lambda item: (len(item[1]), item[0])):
        number = 0
        for run in _new_paragraphs(text, seen):
            for block in _blocks(run):
                number += 1
                passages.append(Passage(block, f"{topic}#{number}"))
    return passages


def _new_paragraphs(text: str, seen: set[str]) -> Iterator[list[str]]:
    """Yield runs of paragraphs that haven't occurred before."""
    paragraphs = [part for part in re.split(r"\n\s*\n", text.strip("\n")) if part.strip()]
    fresh = []
    for paragraph in paragraphs:
        key = " ".join(paragraph.split())
        fresh.append((key not in seen, paragraph))
        seen.add(key)
    for is_new, group in groupby(fresh, key=lambda pair: pair[0]):
        if is_new:
            yield [paragraph for _, paragraph in group]


def _blocks(paragraphs: list[str]) -> Iterator[str]:
    """Join paragraphs until each passage has ``PASSAGE_WORDS`` words or more."""
    block: list[str] = []
    words = 0
    for paragraph in paragraphs:
        block.append(paragraph)
        words += len(paragraph.split())
        if words >= PASSAGE_WORDS:
            yield "\n\n".join(block)
            block, words = [], 0
    if block:
        yield "\n\n".join(block)
