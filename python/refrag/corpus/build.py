"""Builds a corpus: cleans and splits the documents of many packages, and writes them with a manifest of sources."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from refrag import deprecated
from refrag.corpus.budget import capped_level
from refrag.corpus.cleaning import Deduplicator, is_english_prose
from refrag.corpus.debian import Package, licences
from refrag.corpus.texts import TextFile, needs, read_text, text_files


@dataclasses.dataclass(frozen=True)
class Document:
    """A document of the corpus.

    Attributes
    ----------
    id : str
        Package and path.
    text : str
    source : str
        The package.
    """

    id: str
    text: str
    source: str


@dataclasses.dataclass
class Source:
    """The documents of a package.

    Attributes
    ----------
    entry : dict
        The package's entry in the manifest: name, version, sha256, licences and counts.
    documents : list of Document
    """

    entry: dict[str, Any]
    documents: list[Document]


@dataclasses.dataclass(frozen=True)
class CorpusSettings:
    """Settings of a corpus.

    Attributes
    ----------
    cap : float
        Maximum fraction of the characters from a single package.
    validation : float
        Fraction of the documents for validation.
    min_characters : int
        Minimum length of a document.
    workers : int
        Number of processes that convert files.
    seed : int
        Seed for sampling the documents of packages over the cap, and the validation documents.
    """

    cap: float = 0.25
    validation: float = 0.02
    min_characters: int = 1000
    workers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation: got {self.validation}, needs a fraction from 0 up to 1")
        if self.min_characters < 1 or self.workers < 1:
            raise ValueError(f"min_characters, workers: got {self.min_characters}, {self.workers}, need 1 or more")
        capped_level([1] * 1000, self.cap)


@deprecated.renamed_keyword("output", "folder")
def build_corpus(
    packages: Sequence[Package],
    held_out: Mapping[str, Sequence[Package]],
    settings: CorpusSettings,
    folder: Path,
    progress: Callable[[Sequence[Package]], Iterable[Package]] = iter,
) -> dict[str, Any]:
    """Write a corpus: ``train.jsonl``, ``valid.jsonl``, ``heldout-NAME.jsonl`` for each domain, and ``manifest.json``.

    Reads the held-out domains first, so that deduplication removes their paragraphs from the training text.

    Parameters
    ----------
    packages : sequence of Package
        Packages to train on.
    held_out : mapping
        Domain -> packages for evaluation.
    settings : CorpusSettings
    folder : Path
        A new folder, which appears only when it is complete.
    progress : callable, optional
        Wraps the packages to show progress.

    Returns
    -------
    dict
        The manifest.

    Raises
    ------
    ValueError
        If the folder exists, a package has no usable text, or there are too few packages for the cap.
    """
    once = Deduplicator()
    with whole_folder(folder) as part, concurrent.futures.ProcessPoolExecutor(settings.workers) as pool:
        domain_of = {package: domain for domain, group in held_out.items() for package in group}
        read: dict[str, Source] = {}
        for package in progress([*domain_of, *packages]):
            read[package.name] = _read(package, settings, once, pool.map)
        sources = [read[package.name] for package in packages]
        level = capped_level([_characters(source.documents) for source in sources], settings.cap)
        for source in sources:
            source.documents = _up_to(level, source.documents, settings.seed)
        splits: dict[str, list[Document]] = {"train": [], "valid": []}
        for source in sources:
            for document in source.documents:
                set_apart = _draw(settings.seed, "split", document.id) < settings.validation
                splits["valid" if set_apart else "train"].append(document)
        for domain, group in held_out.items():
            splits[f"heldout-{domain}"] = [document for package in group for document in read[package.name].documents]
        manifest = {
            "settings": {key: value for key, value in vars(settings).items() if key != "workers"},
            "splits": {name: _counts(documents) for name, documents in splits.items()},
            "packages": [{**source.entry, **_counts(source.documents), "held_out": domain_of.get(package)}
                         for package, source in ((package, read[package.name]) for package in [*packages, *domain_of])],
        }  # fmt: skip
        for name, documents in splits.items():
            documents.sort(key=lambda document: _draw(settings.seed, "order", document.id))
            with open(part / f"{name}.jsonl", "w", encoding="utf-8") as file:
                for document in documents:
                    file.write(json.dumps(dataclasses.asdict(document), ensure_ascii=False) + "\n")
        (part / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


@deprecated.renamed_keyword("output", "folder")
@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``folder`` on success, and removed otherwise.

    Raises
    ------
    ValueError
        If ``folder`` exists.
    """
    if folder.exists():
        raise ValueError(f"{folder}: exists, needs a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.part-{uuid.uuid4().hex}")
    part.mkdir()
    try:
        yield part
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _read(package: Package, settings: CorpusSettings, once: Deduplicator, parallel: Callable[..., Any]) -> Source:
    with package.unpacked() as folder:
        files = text_files(folder)
        needs(files)
        stated = licences(package, folder)
        texts = list(parallel(_prose, files, chunksize=16))
    documents, repeated = [], 0
    for file, text in zip(files, texts):
        if len(text) < settings.min_characters:
            continue
        fresh = once.fresh(text)
        if fresh is None or len(fresh) < settings.min_characters:
            repeated += 1
            continue
        documents.append(Document(f"{package.name}/{file.name}", fresh, package.name))
    if not documents:
        raise ValueError(
            f"{package.name}: none of its {len(files)} files has {settings.min_characters} characters of new prose"
        )
    entry = {
        "name": package.name,
        "version": package.version,
        "sha256": package.sha256(),
        "licences": stated,
        "files": len(files),
        "dropped": {"short or no English prose": len(files) - len(documents) - repeated, "repeated": repeated},
    }
    return Source(entry, documents)


def _prose(file: TextFile) -> str:
    text = read_text(file)
    return text if is_english_prose(text) else ""


def _up_to(level: int, documents: list[Document], seed: int) -> list[Document]:
    """Sample documents with at most ``level`` characters in total."""
    taken, characters = [], 0
    for document in sorted(documents, key=lambda document: _draw(seed, "cap", document.id)):
        if characters + len(document.text) <= level:
            taken.append(document)
            characters += len(document.text)
    return taken


def _draw(seed: int, what: str, id: str) -> float:
    """Return a number from 0 to 1 that depends only on the seed, the purpose and a document's id."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{what}/{id}".encode()).digest()[:7], "big") / 2**56


def _characters(documents: Iterable[Document]) -> int:
    return sum(len(document.text) for document in documents)


def _counts(documents: Sequence[Document]) -> dict[str, int]:
    return {"documents": len(documents), "characters": _characters(documents)}
