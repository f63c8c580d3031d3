"""Reads the entries of dictd dictionaries: GCIDE with its fields, WordNet and FOLDOC."""

from __future__ import annotations

import dataclasses
import gzip
import re
from collections.abc import Callable, Iterator
from pathlib import Path

# dictd writes numbers in base 64, the most significant digit first.
_DIGITS = {
    letter: value for value, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
}
_FIELD = r"\(((?:[A-Z][a-z]+\.?)(?:(?: ?& ?|, )[A-Z][a-z]+\.?)*)\)"
# A clause doesn't end after an abbreviation or an initial.
_ABBREVIATIONS = ("esp", "specif", "usu", "cf", "Cf", "etc", "e\\.g", "i\\.e", "[A-Z]")
_CLAUSE_END = re.compile(r"(?<=[;.])" + "".join(rf"(?<!\b{short}\.)" for short in _ABBREVIATIONS) + r" (?=\S)")
# GCIDE's labels of fields.
_DOMAINS = {
    "Alg": "mathematics", "Anat": "anatomy", "Arch": "architecture", "Astron": "astronomy", "Biol": "biology",
    "Bot": "botany", "Chem": "chemistry", "Com": "commerce", "Computers": "computing", "Eccl": "church",
    "Elec": "electricity", "Geol": "geology", "Geom": "mathematics", "Gram": "grammar", "Her": "heraldry", "Law": "law",
    "Mach": "mechanics", "Math": "mathematics", "Mech": "mechanics", "Med": "medicine", "Metal": "mining",
    "Mil": "war", "Min": "mineralogy", "Mining": "mining", "Mus": "music", "Music": "music", "Naut": "seafaring",
    "Opt": "physics", "Paleon": "paleontology", "Physics": "physics", "Physiol": "physiology", "Surg": "medicine",
    "Zool": "zoology",
}  # fmt: skip


_PASSAGE_WORDS = 70
DICTIONARIES = ("gcide", "wn", "foldoc")


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of a dictionary.

    Attributes
    ----------
    headword : str
    definition : str
        The first sense with a field label, or the first sense if none has one.
    text : str
        The entry as running text, without etymology and pronunciation.
    kind : str
        noun, verb, or other.
    domain : str
        The field of that sense, such as law or medicine; "general" without a label, "computing" for FOLDOC.
    source : str
        gcide, wn or foldoc.
    """

    headword: str
    definition: str
    text: str
    kind: str
    domain: str
    source: str


def read_dictionary(folder: Path, name: str) -> list[Entry]:
    """Return the entries of a dictionary that have a definition.

    Parameters
    ----------
    folder : Path
        Folder of NAME.index and NAME.dict.dz.
    name : str
        gcide, wn or foldoc.

    Raises
    ------
    ValueError
        If the files are missing, or are not a dictionary. The message names them.
    """
    index, content = folder / f"{name}.index", folder / f"{name}.dict.dz"
    for file in (index, content):
        if not file.is_file():
            raise ValueError(f"{file}: doesn't exist, needs dictionary {name}")
    try:
        data = gzip.decompress(content.read_bytes())
        places = [line.split("\t") for line in index.read_text(encoding="utf-8").splitlines()]
        spans = {(_number(start), _number(length)): word for word, start, length in reversed(places)}
    except (OSError, EOFError, ValueError, KeyError):
        raise ValueError(f"{index}: is not the index of a dictd dictionary, or {content.name} is damaged") from None
    parse = _PARSERS[name]
    entries = []
    for (start, length), word in sorted(spans.items()):
        if not word.startswith("00-database"):
            entry = parse(word, data[start : start + length].decode("utf-8", errors="replace"))
            if entry is not None:
                entries.append(entry)
    return entries


def _gcide(word: str, text: str) -> Entry | None:
    lines = [
        line
        for line in text.split("\n")
        if not re.fullmatch(r"\s*\[[^\]]*(Webster|WordNet|PJC|Corpus)[^\]]*\]\s*", line)
    ]
    lines = [re.sub(r"\s*\[(1913 Webster|WordNet[^\]]*|PJC|Webster[^\]]*)\]\s*.*$", "", line) for line in lines]
    found = re.match(r"([^\\]+?) \\", lines[0]) if lines else None
    if found is None:
        return None
    headword = _plain(found[1])
    # The head, with pronunciation and etymology, ends before the first line that begins a sense.
    end = 1
    while end < len(lines) and not (
        _balanced(" ".join(lines[:end])) and re.match(r"   (\d+\. |\([a-z]\) |\"?[A-Z])", lines[end])
    ):
        end += 1
    head = " ".join(lines[:end])
    blocks = re.split(r"\n\s*\n", "\n".join(lines[end:]))
    # Quotations are indented more deeply than senses.
    blocks = [" ".join(block.split()) for block in blocks if block.strip() and not re.match(r"\n*\s{9}", block)]
    senses = [block for block in blocks if not re.match(r"(Note|Syn|Usage):|--|\{", block)]
    if not senses:
        return None
    marked = next((sense for sense in senses if re.match(r"(\d+\. )?" + _FIELD, sense)), None)
    at_head = re.search(_FIELD + r"\s*$", head)
    first = re.sub(r"^\d+\. ", "", senses[0] if marked is None or at_head else marked)
    field = at_head or re.match(_FIELD, first)
    first = re.sub(r"^" + _FIELD + r"\s*", "", first)
    first = re.split(r" (?=\([b-z]\) )", re.sub(r"^\(a\) ", "", first))[0]
    kind = re.search(r"[,)] ?(n|v\. ?[ti]|v|a|adv)\.", head)
    kinds = {"n": "noun", "v": "verb", "v. t": "verb", "v. i": "verb"}
    return _entry(
        headword, first, " ".join(senses), kinds.get(kind[1], "other") if kind else "other",
        _DOMAINS.get(re.split(r" ?& ?|, ", field[1])[0].rstrip("."), "general") if field else "general", "gcide",
    )  # fmt: skip


def _wordnet(word: str, text: str) -> Entry | None:
    lines = text.split("\n")
    body = " ".join(" ".join(lines[1:]).split())
    senses = re.findall(r"(?:^| )(?:(n|v|adj|adv) )?\d+: (.*?)(?= (?:(?:n|v|adj|adv) )?\d+: |$)", body)
    senses = [(kind, re.sub(r"\s*\[(syn|ant|also): .*?\]", "", sense).strip()) for kind, sense in senses]
    if not senses:
        return None
    kind, first = senses[0]
    if kind in ("adj", "adv") or not first:
        kind = "other"
    first = re.sub(r"^\((?:\w+ )?[^)]*\)\s+", "", first.split('; "')[0])
    kind = {"n": "noun", "v": "verb"}.get(kind, "other")
    return _entry(lines[0], first, ". ".join(sense for _, sense in senses), kind, "general", "wn")


def _foldoc(word: str, text: str) -> Entry | None:
    lines = text.split("\n")
    blocks = [" ".join(block.split()) for block in re.split(r"\n\s*\n", "\n".join(lines[1:])) if block.strip()]
    found = next((block for block in blocks if block.startswith("<")), None)
    if found is None:
        return None
    first = re.sub(r"^<[^>]*>\s*", "", found)
    first = re.sub(r"^\((?:Or |From |After |Plural |Also )[^)]*\)\s*|^\(?[A-Z0-9/.-]+\)\s+", "", first)
    following = blocks[blocks.index(found) + 1 :]
    prose = [block for block in following if not re.match(r"[\[({<]|See ", block)]
    return _entry(word if lines[0].lower() != word.lower() else lines[0], first, " ".join([first, *prose]), "noun",
                  "computing", "foldoc")  # fmt: skip


_PARSERS: dict[str, Callable[[str, str], Entry | None]] = {"gcide": _gcide, "wn": _wordnet, "foldoc": _foldoc}


def first_clauses(text: str) -> str | None:
    """Return the first clauses of a text, up to about 24 words, without a full stop; None if not 3 to 40 words.

    Examples
    --------
    >>> first_clauses("Strip leading components; the default is none. " + "More about it. " * 9)[:40]
    'Strip leading components; the default is'
    """
    taken = ""
    for clause in _clauses(text):
        if taken and (clause.startswith(("See ", "Cf.", "--")) or len(f"{taken} {clause}".split()) > 24):
            break
        taken = f"{taken} {clause}".strip()
        if taken.endswith(".") and len(taken.split()) >= 3:
            break
    taken = taken.rstrip(" ;,.:")
    return taken if 3 <= len(taken.split()) <= 40 else None


def first_words(text: str, count: int) -> str:
    """Return the first clauses with at most ``count`` words; cut the first clause if it alone is longer."""
    taken: list[str] = []
    for clause in _clauses(text):
        words = clause.split()
        if taken and len(taken) + len(words) > count:
            break
        taken += words[: count if not taken else None]
    return re.sub(r"(?<=[.;]) \d+\.?$", "", " ".join(taken).rstrip(" ;,"))  # remove the number of a sense cut off


def _entry(headword: str, first: str, text: str, kind: str, domain: str, source: str) -> Entry | None:
    definition = first_clauses(re.sub(r"^(pl\.|sing\.) ", "", _plain(first)))
    says_little = re.match(
        r"\d|\(|See |Same as|Alt\. of|imp\.|p\. |pl\. of|(One who|The act of) \S+$", definition or "See "
    )
    if definition is None or says_little or not headword or len(headword) > 40:
        return None
    words = first_words(_plain(text), _PASSAGE_WORDS)
    if definition not in words:  # a later sense, which was cut off
        words = first_words(_plain(first), _PASSAGE_WORDS)
    return Entry(headword, definition, words, kind, domain, source)


def _clauses(text: str) -> Iterator[str]:
    yield from (part for part in _CLAUSE_END.split(text) if part)


def _plain(text: str) -> str:
    """Remove markup: links, accents in brackets, labels such as [Obs.], and names of authors."""
    text = re.sub(r"\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\[(?:['`^\"=.~,-]|\^)?([A-Za-z]{1,2})['\"]?\]", r"\1", text)
    text = re.sub(r"\[[^\]]*\]|--\s*called also .*?(?=\.|$)|--\s*[A-Z]\S*[`*\"]\S*, \w+\.?|--\s*\w{1,3}\.?$", "", text)
    text = re.sub(r"[;,]?\s*--\s?[A-Z][\w.' ]*(?:\([^)]*\)\.?)?(?=\s|$)", "", text)
    return " ".join(text.split())


def _balanced(text: str) -> bool:
    # Bracketed accents such as [=a] are balanced too.
    return text.count("[") == text.count("]") and text.count("(") <= text.count(")")


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = 64 * value + _DIGITS[digit]
    return value
