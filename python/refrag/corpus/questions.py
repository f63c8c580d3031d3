"""Questions over passages: the one that answers, and others to be told from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import lzma
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from refrag.file_modes import write_whole

UNANSWERED = "The passages do not say."


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, its answer and the passages to find it in.

    Attributes
    ----------
    question, answer : str
    passages : list of str
    gold : int
        Index of the passage that answers; -1 where none does, and the answer says so.
    domain, source : str
        Such as law and gcide.
    """

    question: str
    answer: str
    passages: list[str]
    gold: int
    domain: str
    source: str


@dataclasses.dataclass(frozen=True)
class QuestionSettings:
    """How contexts are drawn.

    Attributes
    ----------
    passages : int
        Of a context.
    hard : float
        Share of the questions whose other passages are the most alike; the rest has them at random.
    unanswerable : float
        Share of the questions whose answer is not among the passages.
    test : float
        Share of the headwords or pages that is set apart.
    held_out_domains : tuple of str
        Domains that are in no training question or passage: all their questions are test questions.
    seed : int
    """

    passages: int = 10
    hard: float = 0.5
    unanswerable: float = 0.1
    test: float = 0.03
    held_out_domains: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.passages < 2:
            raise ValueError(f"passages: got {self.passages}, needs 2 or more")
        for name in ("hard", "unanswerable", "test"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, needs a share from 0 up to 1")

    def is_test(self, key: str, domain: str) -> bool:
        """Return whether a headword or page is set apart; it follows from the seed and the key alone."""
        digest = hashlib.sha256(f"{self.seed}/test/{key.lower()}".encode()).digest()
        return domain in self.held_out_domains or int.from_bytes(digest[:7], "big") / 2**56 < self.test

    def random(self, key: str) -> random.Random:
        """Return the random numbers of one question."""
        return random.Random(f"{self.seed}/{key}")


def draw_question(
    asked: tuple[str, str],
    gold: str,
    alike: Sequence[str],
    others: Sequence[str],
    settings: QuestionSettings,
    *,
    answers: Callable[[str], bool],
    domain: str,
    source: str,
) -> Question:
    """Return a question with its context.

    Parameters
    ----------
    asked : tuple of str
        Question and answer.
    gold : str
        The passage that answers.
    alike : sequence of str
        Passages that don't answer, the most alike first.
    others : sequence of str
        Passages to draw from at random.
    settings : QuestionSettings
    answers : callable
        Whether a passage might answer too: such ones are left out.
    domain, source : str

    Raises
    ------
    ValueError
        If there are too few passages.
    """
    draw = settings.random(f"{source}/{asked[0]}/{gold}")
    hard, answered = draw.random() < settings.hard, draw.random() >= settings.unanswerable
    wanted = settings.passages - answered
    context = [passage for passage in dict.fromkeys(alike) if not answers(passage)][:wanted] if hard else []
    used = {gold, *context}
    for _ in range(100 * settings.passages):
        if len(context) == wanted or not others:
            break
        candidate = others[draw.randrange(len(others))]
        if candidate not in used and not answers(candidate):
            used.add(candidate)
            context.append(candidate)
    if len(context) < wanted:
        raise ValueError(
            f"passages: got {settings.passages}, there are too few others ({len(others)}) for {asked[0]!r}"
        )
    if answered:
        context.append(gold)
    draw.shuffle(context)
    return Question(
        asked[0], asked[1] if answered else UNANSWERED, context, context.index(gold) if answered else -1, domain, source
    )


def write_questions(path: Path, questions: Iterable[Question]) -> None:
    """Write questions as JSON lines, compressed by xz where the name ends so; seen either whole or not at all."""
    lines = "".join(json.dumps(dataclasses.asdict(question), ensure_ascii=False) + "\n" for question in questions)
    content = lines.encode()
    if path.suffix == ".xz":
        # Passages come again far apart, as others' company: the window spans them.
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 27}]
        content = lzma.compress(content, filters=filters)
    write_whole(path, content)
