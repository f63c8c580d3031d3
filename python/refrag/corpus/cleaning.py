"""What is worth training on: English prose, each paragraph once."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

# The words that a language model's filter looks for (Rae et al., arXiv 2112.11446, appendix A), and others that no
# other language has many of ("a", "in" and "for" are words of several).
_STOP_WORDS = frozenset("the be to of and that have with is it as are this by from can if which or not".split())
_WORD = re.compile(r"[^\W\d_]+")
_SHORT = 40  # letters of a paragraph that may be repeated: headings and the like,
_REPEATS = 3  # but so often in a document


def is_english_prose(text: str, *, share: float = 0.1) -> bool:
    """Return whether a share of the words are those that English prose can't do without.

    Half of the pages in Debian's manuals have more than a fifth; listings and other languages have less than a tenth.

    Examples
    --------
    >>> is_english_prose("The file is copied to a folder of the same name."), is_english_prose("Il file viene copiato")
    (True, False)
    """
    words = _WORD.findall(text.lower())
    return bool(words) and sum(word in _STOP_WORDS for word in words) >= share * len(words)


class Deduplicator:
    """Keeps each paragraph where it is first met. Digits, capitals and spacing don't make a paragraph another one.

    Examples
    --------
    >>> once = Deduplicator()
    >>> paragraph = "This paragraph is long enough to be told from a heading."
    >>> once.fresh(f"One\\n\\n{paragraph}")[:5], once.fresh(f"Two\\n\\n{paragraph}")
    ('One\\n\\n', None)
    """

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def fresh(self, text: str) -> str | None:
        """Return a text without the paragraphs met before; None if those are more than half of it."""
        kept = []
        short: Counter[str] = Counter()
        for paragraph in re.split(r"\n\s*\n", text):
            normal = " ".join(paragraph.lower().split())
            if len(normal) >= _SHORT:
                key = hashlib.blake2b(re.sub(r"\d", "0", normal).encode(), digest_size=8).digest()
                if key in self._seen:
                    continue
                self._seen.add(key)
            else:
                short[normal] += 1
                if short[normal] > _REPEATS:
                    continue
            kept.append(paragraph)
        result = "\n\n".join(kept)
        return result if 2 * len(result) > len(text) else None
