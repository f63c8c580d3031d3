"""Filters for training text, which keep only English prose and each paragraph only once."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

# The stop words of Rae et al. (arXiv 2112.11446, appendix A), and others that, unlike "a", "in" and "for", are rare in
# other languages.
_STOP_WORDS = frozenset("the be to of and that have with is it as are this by from can if which or not".split())
_WORD = re.compile(r"[^\W\d_]+")
_SHORT = 40  # shorter paragraphs, such as headings, may be repeated,
_REPEATS = 3  # but only this often in a document


def is_english_prose(text: str, *, share: float = 0.1) -> bool:
    """Return whether at least ``share`` of the words are English stop words.

    Half of the pages in Debian's manuals have more than a fifth; listings and other languages have less than a tenth.

    Examples
    --------
    >>> is_english_prose("The file is copied to a folder of the same name."), is_english_prose("Il file viene copiato")
    (True, False)
    """
    words = _WORD.findall(text.lower())
    return bool(words) and sum(word in _STOP_WORDS for word in words) >= share * len(words)


class Deduplicator:
    """Removes paragraphs that occurred before, ignoring differences in digits, capitals and spacing.

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
        """Remove the paragraphs that occurred before; return None if less than half of the text remains."""
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
