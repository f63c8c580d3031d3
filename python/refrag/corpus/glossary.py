"""Makes questions about the meaning of words, such as "What is an abatis?", from dictionaries."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from refrag.corpus.budget import even_level
from refrag.corpus.dictionaries import Entry
from refrag.corpus.questions import Question, QuestionSettings, draw_question

_NEIGHBOURS = 24  # nearest entries to fetch, from which those of the same headword are then removed


def select_entries(entries: Sequence[Entry], count: int, settings: QuestionSettings) -> list[Entry]:
    """Sample ``count`` entries, spread over each dictionary's domains as evenly as possible.

    Takes at most one entry per headword and domain of a dictionary.

    Raises
    ------
    ValueError
        If there are fewer entries.
    """
    groups: dict[tuple[str, str], dict[str, Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.source, entry.domain), {}).setdefault(entry.headword.lower(), entry)
    sizes = [len(group) for group in groups.values()]
    level = even_level(sizes, count, what="questions: got {}, the dictionaries have {} entries")
    chosen = []
    for group in groups.values():
        draw = settings.random(next(iter(group)))
        chosen += draw.sample(list(group.values()), min(level, len(group)))
    return chosen


def glossary_questions(
    entries: Sequence[Entry], embed: Callable[[Sequence[str]], np.ndarray], settings: QuestionSettings
) -> tuple[list[Question], list[Question]]:
    """Return the training questions and the test questions, which have no headword in common.

    Parameters
    ----------
    entries : sequence of Entry
        Each entry gets one question, and is a passage of other questions. Training passages are entries of training
        headwords only.
    embed : callable
        Texts -> unit vectors [N, d], to find similar entries.
    settings : QuestionSettings

    Raises
    ------
    ValueError
        If there are too few entries for a context.
    """
    held = [settings.is_test(entry.headword, entry.domain) for entry in entries]
    # A headword with a sense in a held-out domain is a test headword in every dictionary.
    test_words = {entry.headword.lower() for entry, test in zip(entries, held) if test}
    sides: tuple[list[Question], list[Question]] = ([], [])
    vectors = embed([f"{entry.headword}: {entry.definition}" for entry in entries])
    training = np.array([entry.headword.lower() not in test_words for entry in entries])
    for side, among in ((0, np.flatnonzero(training)), (1, np.arange(len(entries)))):
        asked = among if side == 0 else np.flatnonzero(~training)
        texts = [passage_text(entries[index]) for index in among.tolist()]
        for index, near in zip(asked.tolist(), _nearest(vectors[asked], vectors[among])):
            entry = entries[index]
            same = entry.headword.lower() + ":"
            alike = [passage_text(entries[other]) for other in among[near].tolist()]
            sides[side].append(
                draw_question(
                    (question_text(entry), entry.definition + "."),
                    passage_text(entry),
                    alike,
                    texts,
                    settings,
                    answers=lambda passage, same=same: passage.lower().startswith(same),  # type: ignore[misc]
                    domain=entry.domain,
                    source=entry.source,
                )  # fmt: skip
            )
        settings.random(f"order/{side}").shuffle(sides[side])
    return sides


def question_text(entry: Entry) -> str:
    """Return the question about an entry.

    Examples
    --------
    >>> question_text(Entry("Abatis", "A means of defense", "", "noun", "general", "gcide"))
    'What is an abatis?'
    >>> question_text(Entry("tort", "Any civil wrong or injury", "", "noun", "law", "gcide"))
    'In law, what does "tort" mean?'
    """
    # GCIDE capitalizes all headwords.
    word = entry.headword[:1].lower() + entry.headword[1:] if entry.source == "gcide" else entry.headword
    where = "" if entry.domain == "general" or entry.source == "foldoc" else f"In {entry.domain}, "
    ask = "what" if where else "What"
    counted = entry.kind == "noun" and entry.definition.split()[0].lower() in ("a", "an", "one")
    if counted and (word[:1].islower() or entry.source == "foldoc"):
        return f"{where}{ask} is {'an' if word[:1].lower() in 'aeiou' else 'a'} {word}?"
    if entry.kind == "noun" and entry.source != "gcide":
        return f"{where}{ask} is {word}?"
    return f'{where}{ask} does "{word}" mean?'


def passage_text(entry: Entry) -> str:
    """Format an entry as a passage."""
    return f"{entry.headword}: {entry.text.rstrip('.')}."


def _nearest(queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Return the indices of the vectors nearest to each query, nearest first. Works in blocks to limit memory."""
    count = min(_NEIGHBOURS, len(vectors))
    rows = [np.empty((0, count), dtype=np.int64)]
    for start in range(0, len(queries), 1024):
        scores = queries[start : start + 1024] @ vectors.T
        near = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(scores, near, 1), axis=1, kind="stable")
        rows.append(np.take_along_axis(near, order, 1))
    return np.concatenate(rows)
