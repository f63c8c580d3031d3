"""Replaced words stay out of code and documentation; the field's own terms are used instead.

A word may stay where users have it: keys in files on disk, command line options, and public names that warn for one
release. ALLOWED lists those places.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = ("bench", "csrc", "docs", "python", "refrag_kernels", "tests", "torch-ext")
FILES = ("CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "README.md", "pyproject.toml", "setup.py")
SUFFIXES = (".py", ".md", ".cpp", ".h", ".cu", ".cuh", ".sh", ".toml", "Makefile")
NOT_OURS = ("docs/results/", "tests/refrag/fixtures/", "tests/refrag/manual.txt", "tests/test_words.py")

CPP = r"csrc/.*\.(cpp|h|cu|cuh)|tests/.*\.(cpp|h)"
PYTHON = r".*\.py"
KERNELS = r"(csrc|refrag_kernels)/.*"


def any_of(*patterns: str) -> str:
    return "|".join(patterns)


@dataclasses.dataclass(frozen=True)
class Word:
    """A word that was replaced.

    Attributes
    ----------
    pattern : str
        Regular expression that finds the word in a line.
    instead : str
        The term to use.
    bad, good : str
        Lines that the pattern must match, and must not match.
    files : str
        Regular expression of the paths to search.
    """

    pattern: str
    instead: str
    bad: tuple[str, ...]
    good: tuple[str, ...] = ()
    files: str = ".*"


_READERS = "rows?|chunks?|queries|query|passages?|blocks?|tiles?|questions?|text|keys?|lanes?"

WORDS = {
    # refrag_kernels
    "pinned": Word(
        r"(?<![\w])pinned\(", "effective_backend()", ("backends.pinned(None)",), ("pinned memory", "is_pinned()")
    ),
    "work item": Word(
        any_of(
            r"\b(num_|first_|last_)?[uU]nits?(_\w+)?\b(?= *[=\[\].(]|& )",
            r"\bstruct Unit\b",
            r"\bunits of (a|the) plan\b",
        ),
        "work item (work_item, WorkItem)",
        ("const Unit& unit = units_[task.unit];", "struct Unit {", "units[:, 0]"),
        ("Zen 4's FMA units are half as wide", "handed out in units of 8"),
        r"csrc/cpu/.*|csrc/planner/.*|refrag_kernels/.*",
    ),
    "partial": Word(
        any_of(r"\bslots? of (a |the )?splits?\b", r"\b(split|partial)_slots?\b", r"\bnum_slots\b", r"\bslot_lists\b"),
        "partial (split-KV partial)",
        ("std::vector<int32_t> slot_lists;", "a slot of a split"),
        ("slot_of_row", "the slots of a chunk"),
        r"csrc/.*|refrag_kernels/(triton_kernels/)?(attention|paged|tile|plan).*",
    ),
    "short KV": Word(
        r"\bfew_keys\b|\bfew keys\b", "short_kv, short KV", ("if few_keys:", "tiles of few keys"), ("few chunks",)
    ),
    "fully masked": Word(
        r"(?<![a-z])sees?[ _]nothing\b",
        "fully masked rows",
        ("a row that sees nothing", "test_rows_that_see_nothing"),
    ),
    "attends to": Word(
        rf"\b({_READERS}) ((that|which|may|can|must|don't|doesn't|both|also|only|then) )*(sees?|looks? at)\b(?! \[)",
        "attends to",
        ("a row sees the keys before it", "chunks that may look at others", "passages don't see each other"),
        ("for the pages, see below", "look at the pages"),
    ),
    "attending": Word(
        r"\b(rows?|queries|blocks?|chunks?) seeing\b", "attending", ("rows seeing a key",), ("without seeing the file",)
    ),
    "tile configuration": Word(
        r"\bConfig\((\w+=\w+, )*(rows|step|warps|stages)=|\bconfig\.(rows|step|warps|stages)\b|\b_replace\(stages=",
        "block_m, block_n, num_warps, num_stages",
        ("Config(step=32)", "config.stages", "config._replace(stages=1)"),
        ("num_stages=3", "config.num_warps"),
        PYTHON,
    ),
    "micro-tile": Word(
        r"\b(\w*_)?[pP]anels?(_\w+)?\b|\bkLinearPanel\b|\bkProjectionPanels\b",
        "micro-tile, packed row",
        ("void weigh_panel(", "kLinearPanel"),
        files=r"csrc/.*",
    ),
    "layout and epilogue": Word(
        r"\b(Strip|Form|Lie|Into)\b",
        "Layout, Epilogue",
        ("struct Strip {", "enum class Form { plain };", "template <class Into>"),
        files=CPP,
    ),
    "occupancy": Word(
        r"\bblocks?[ _]at[ _]once\b|\bwarps at once\b",
        "occupancy, resident CTAs",
        ("registers and blocks at once", "fewest warps at once"),
        ("four requests at once",),
    ),
    "CTA": Word(
        r"\bblocks? of threads\b",
        "CTA (thread block)",
        ("two blocks of threads",),
        ("a thread block", "blocks of 16 rows"),
    ),
    "head_dim": Word(
        any_of(
            r"(?i)\b(max_)?head[ _-]widths?\b",
            r"\bwidths? of (a |the )?heads?\b",
            r"\bheads of width\b",
            r"\bheads? \d+ wide\b",
        ),
        "head_dim",
        ("a head width of 96", "by width of the head", "heads 128 wide"),
        ("the width of the table",),
    ),
    "hidden_size": Word(
        r"\bhidden[ _]widths?\b|\bwidth of the (decoder|encoder)\b",
        "hidden_size",
        ("the hidden width",),
        ("hidden_size",),
    ),
    "online softmax": Word(
        r"\bsoften\w*|\bweigh(s|ed|ing|_\w+)?\b",
        "online-softmax update, probabilities",
        ("void soften(", "weigh_panel("),
        ("weights", "softmax"),
        KERNELS,
    ),
    "row_max": Word(
        r"\blargest(?=\[| *= |\.)|\b(b|m)_largest\b",
        "row_max",
        ("s.largest[lane]", "largest = max(a, b)"),
        ("the largest tile",),
        KERNELS,
    ),
    "small-M": Word(r"(?i)skinny", "small-M", ("skinny_projection_kernel",), ("small_m",)),
    "FLOPs": Word(
        r"\bmultiplications?\b", "FLOPs or MACs", ("1e6 multiplications",), ("multiplies", "matrix products")
    ),
    # refrag
    "selector": Word(
        r"(?i)chooser",
        "selector, Selector",
        ("CosineChooser", "refrag.choosers", "the chooser"),
        ("selector", "choose"),
    ),
    "fingerprint": Word(
        any_of(
            r"\bChunkRecipe\b",
            r"\brefrag\.recipe\b",
            r"\brecipes? of (a|the|its) stores?\b|\bstore's recipe\b",
        ),
        "Fingerprint, fingerprint",
        ("ChunkRecipe(", "the recipe of a store"),
        ("the training recipe", "stages of the recipe"),
    ),
    "resumes": Word(
        r"\b(go|goes|gone|going|went|goes) on from\b|\bto be gone on\b|\bgone on with\b",
        "resumes, continues",
        ("a run goes on from its last checkpoint", "gone on from"),
        ("the run goes on", "depends on from_parts"),
    ),
    "ModelBundle": Word(
        r"(?<![\w'\"])Parts(?=[(\],:|)]|$)|\bclass Parts\b|import .*\bParts\b",
        "ModelBundle",
        ("def run(parts: Parts, folder)", "from refrag.bundle import Parts"),
        ("Parts of a prompt are text", "PARTS"),
        PYTHON,
    ),
    "TrainableSpec": Word(
        r"(?<![\w'\"])Trained(?=[(\],:|)]|$)|\bclass Trained\b|import .*\bTrained\b",
        "TrainableSpec",
        ("trained: Trained", "Trained(encoder='lora')"),
        ("Trained on manuals", "TRAINED"),
        PYTHON,
    ),
    "Progress": Word(
        r"(?<![\w'\"])Track(?=[(\],:|) ]|$)(?! [a-z])",
        "Progress",
        ("track: Track = iter", "import Reading, Track"),
        ("Track down",),
        PYTHON,
    ),
    "encoder, decoder": Word(
        r"\bwriter, reader\b|\breader = Auto|\bwriter(, \w+)? = (AutoModel|token_encoder)",
        "encoder, decoder",
        ("reader = AutoModelForCausalLM.from_pretrained(decoder)",),
        ("csv.writer", "a store's writer"),
        r"python/refrag/(?!store/).*\.py",
    ),
    # Sentences
    "current stream": Word(
        r"\btorch tells\b|\btells no current\b", "could not get", ("torch tells no current stream",)
    ),
    "absent subject": Word(
        r"\bstands? still\b|\bstand(s|ing)? (behind|beside) the (text|row|table)\b",
        "pauses; follows",
        ("Training stands still",),
    ),
}

# Patterns of the path and the line where a word may stay, and the reason.
ALLOWED: dict[str, list[tuple[str, str, str]]] = {
    "selector": [
        (
            r".*",
            r"\bchooser=|`chooser`|\"chooser\":|\bchooser: Selector|^ +chooser : Selector",
            "an argument of public functions",
        ),
        (r"python/refrag/__init__\.py", r"Chooser|choosers", "old names warn for a release"),
        (
            r"python/refrag/(processing/)?(choosers|selectors|deprecat\w+)\.py",
            r"[cC]hooser",
            "old names warn for a release",
        ),
        (r"python/refrag/.*\.py", r"--chooser|chooser(s)? is deprecated|\bchooser: .*deprecat", "the option stays"),
        (r"python/refrag/.*\.py", r"deprecated\.renamed_\w+\(\"chooser\"", "old keywords and attributes warn"),
        (r"python/refrag/integrations/haystack\.py", r"parameters.*\"chooser\"|\"chooser\" in", "files hold it"),
        (r"python/refrag/integrations/vllm/.*\.py", r"\"chooser\"|chooser: got it", "an old field of requests warns"),
        (r"python/refrag/commands/evaluate\.py", r"\"choosers\": options", "a key of files"),
        (r"python/refrag/training/options\.py", r"formerly.*choosers", "the option stays"),
        (r"tests/.*test_(deprecat|old_names|moved)\w*\.py", r"[cC]hooser", "tests that old names warn"),
        (r"tests/refrag/test_config_files\.py", r"\"choosers\"", "tests that the option stays"),
        (
            r"docs/.*\.md|README\.md|CHANGELOG\.md",
            r"`--chooser`|`[A-Za-z]*Chooser[a-z]*` (is|are|was|were|->)",
            "says what was renamed",
        ),
    ],
    "pinned": [
        (r"refrag_kernels/.*\.py", r"def pinned\(|deprecat", "the old name warns for a release"),
        (r"tests/kernels/test_backends\.py", r"backends\.pinned\(", "tests that the old name warns"),
    ],
    "fingerprint": [
        (r"python/refrag/(__init__|deprecated)\.py", r"ChunkRecipe", "the old name warns for a release"),
        (r"tests/.*test_(deprecat|old_names|moved)\w*\.py", r"ChunkRecipe|\.recipe\b", "tests that old names warn"),
        (r"CHANGELOG\.md", r"`ChunkRecipe`", "says what was renamed"),
    ],
    "tile configuration": [],
}


def sources():
    """Yield every file to search, with its path in the repository."""
    for place in PLACES:
        for path in sorted((ROOT / place).rglob("*")):
            name = str(path.relative_to(ROOT))
            if (
                name.endswith(SUFFIXES)
                and path.is_file()
                and not name.startswith(NOT_OURS)
                and "__pycache__" not in name
            ):
                yield name, path
    for name in FILES:
        yield name, ROOT / name


TEXTS = {name: path.read_text() for name, path in sources()}


def is_allowed(word: str, name: str, line: str) -> bool:
    return any(re.fullmatch(path, name) and re.search(text, line) for path, text, _ in ALLOWED.get(word, []))


def places_of(word: str, within: str = ".*") -> list[str]:
    """Return the places where a word still occurs, as path:line: text."""
    pattern, files = re.compile(WORDS[word].pattern), re.compile(WORDS[word].files)
    return [
        f"{name}:{number}: {line.strip()[:150]}"
        for name, text in TEXTS.items()
        if files.fullmatch(name) and re.fullmatch(within, name)
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line) and not is_allowed(word, name, line)
    ]


@pytest.mark.parametrize("word", WORDS)
def test_a_word_that_left(word):
    found = places_of(word)
    assert not found, f"write {WORDS[word].instead} in {len(found)} places:\n" + "\n".join(found)


@pytest.mark.parametrize("word", WORDS)
def test_patterns(word):
    """Patterns match the replaced words but not ordinary English."""
    assert all(re.search(WORDS[word].pattern, line) for line in WORDS[word].bad), word
    assert not any(re.search(WORDS[word].pattern, line) for line in WORDS[word].good), word


def test_files_are_searched():
    assert {"README.md", "docs/index.md", "csrc/ops.cpp", "refrag_kernels/plan.py"} <= set(TEXTS)
    assert set(ALLOWED) <= set(WORDS)
