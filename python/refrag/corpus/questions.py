"""Questions with passages, one of which contains the answer while the others are distractors."""

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
    """A question, its answer and its passages.

    Attributes
    ----------
    question, answer : str
    passages : list of str
    gold : int
        Index of the passage with the answer; -1 if none has it, which the answer then says.
    domain, source : str
        For example law and gcide.
    """

    question: str
    answer: str
    passages: list[str]
    gold: int
    domain: str
    source: str


@dataclasses.dataclass(frozen=True)
class QuestionSettings:
    """How to draw passages and split questions.

    Attributes
    ----------
    passages : int
        Passages per question.
    hard : float
        Fraction of the questions whose distractors are the most similar passages; other questions have random ones.
    unanswerable : float
        Fraction of the questions whose answer is not in the passages.
    test : float
        Fraction of the headwords or pages for testing.
    held_out_domains : tuple of str
        Domains for testing only, which are in no training question or passage.
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
                raise ValueError(f"{name}: got {getattr(self, name)}, needs a fraction from 0 up to 1")

    def is_test(self, key: str, domain: str) -> bool:
        """Return whether a headword or page is for testing, which depends only on the seed, the key and the domain."""
        digest = hashlib.sha256(f"{self.seed}/test/{key.lower()}".encode()).digest()
        return domain in self.held_out_domains or int.from_bytes(digest[:7], "big") / 2**56 < self.test

    def random(self, key: str) -> random.Random:
        """Return a random generator for one question."""
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
    """Draw the passages of a question.

    Parameters
    ----------
    asked : tuple of str
        Question and answer.
    gold : str
        The passage with the answer.
    alike : sequence of str
        Similar passages, the most similar first.
    others : sequence of str
        Passages to draw from at random.
    settings : QuestionSettings
    answers : callable
        Returns whether a passage may have the answer too; such passages are not drawn.
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
            f"passages: got {settings.passages}, needs more than {len(others)} others to draw from for {asked[0]!r}"
        )
    if answered:
        context.append(gold)
    draw.shuffle(context)
    return Question(
        asked[0], asked[1] if answered else UNANSWERED, context, context.index(gold) if answered else -1, domain, source
    )


def write_questions(path: Path, questions: Iterable[Question]) -> None:
    """Write questions as JSON lines atomically, compressed if the name ends with .xz."""
    lines = "".join(json.dumps(dataclasses.asdict(question), ensure_ascii=False) + "\n" for question in questions)
    content = lines.encode()
    if path.suffix == ".xz":
        # Passages recur far apart, as distractors of other questions: use a window large enough to find them.
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 27}]
        content = lzma.compress(content, filters=filters)
    write_whole(path, content)
