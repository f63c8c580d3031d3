"""`refrag data`: make training and evaluation data from Debian packages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from refrag.console import clear_errors, track

if TYPE_CHECKING:
    import numpy as np

    from refrag.corpus.questions import Question

data = typer.Typer(no_args_is_help=True, help="Make text and questions for training and evaluation.")

Packages = Annotated[Path, typer.Option("--packages", help="Folder for downloaded packages, which are reused.")]
Passages = Annotated[int, typer.Option(help="Passages per question.")]
Unanswerable = Annotated[float, typer.Option(help="Fraction of questions whose answer is not in the passages.")]
Compressed = Annotated[bool, typer.Option("--xz", help="Compress the training questions with xz.")]
Seed = Annotated[int, typer.Option(help="Seed of all random choices.")]


@data.command()
def corpus(
    output: Annotated[Path, typer.Option(help="Folder for the text and its manifest; must not exist.")],
    packages: Packages = Path("debian-packages"),
    package: Annotated[
        list[str] | None,
        typer.Option(help="Debian package to use; may be repeated. By default, about forty packages of manuals."),
    ] = None,
    held_out: Annotated[
        bool,
        typer.Option(help="Read the held-out manuals too: Debian's handbook, PostgreSQL, Perl and Git."),
    ] = True,
    cap: Annotated[float, typer.Option(help="Maximum fraction of the text from a single package.")] = 0.25,
    validation: Annotated[float, typer.Option(help="Fraction of the documents for validation.")] = 0.02,
    min_characters: Annotated[int, typer.Option(help="Minimum length of a document, in characters.")] = 1000,
    workers: Annotated[int, typer.Option(help="Processes that convert files.")] = 2,
    seed: Seed = 0,
) -> None:
    """Make a corpus from manuals: train.jsonl, valid.jsonl, heldout-*.jsonl and manifest.json.

    Downloads packages with apt-get, without root. Converts HTML, manual pages, Info files and text to plain text
    without navigation, removes repeated paragraphs, and drops files that are not English prose. The held-out manuals
    are for evaluation only: the training text contains none of their paragraphs.
    """
    console = Console()
    with clear_errors(console):
        from refrag.corpus.build import CorpusSettings, build_corpus
        from refrag.corpus.debian import DOCUMENTATION, HELD_OUT, fetch, refuse_held_out

        settings = CorpusSettings(cap, validation, min_characters, workers, seed)
        names = list(dict.fromkeys(package or DOCUMENTATION))
        refuse_held_out(names)
        if output.exists():
            raise ValueError(f"--output: {output} exists, needs a new folder")
        wanted = [*names, *(name for group in HELD_OUT.values() for name in group if held_out)]
        found = {name: fetch(name, packages) for name in track(console, wanted, "downloading packages")}
        domains = {domain: [found[name] for name in group] for domain, group in HELD_OUT.items()} if held_out else {}
        manifest = build_corpus(
            [found[name] for name in names], domains, settings, output,
            lambda read: track(console, read, "reading packages"),
        )  # fmt: skip
        for name, counts in manifest["splits"].items():
            console.print(f"{name}: {counts['documents']:,} documents, {counts['characters']:,} characters")
        console.print(f"Wrote {output}", highlight=False, soft_wrap=True)


@data.command()
def tokens(
    corpus: Annotated[Path, typer.Argument(help="Output folder of `refrag data corpus`.")],
    output: Annotated[Path, typer.Option(help="Folder for train.tok, valid.tok and heldout-*.tok.")],
    decoder: Annotated[
        str | None, typer.Option(help="Folder or name of the decoder whose tokenizer to use; by default SmolLM2.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens to train on, as equally from each package as possible; by default all."),
    ] = None,
    valid_tokens: Annotated[int, typer.Option(help="Maximum tokens of valid.tok.")] = 500_000,
    held_out_tokens: Annotated[int, typer.Option(help="Maximum tokens of each heldout-*.tok.")] = 300_000,
    piece_mib: Annotated[
        int | None, typer.Option("--piece-mib", help="Maximum MiB per file; larger sets become train-1.tok and so on.")
    ] = None,
) -> None:
    """Tokenize a corpus into token files, for training on a machine without a network.

    refrag.training.token_files.load_tokens reads them with numpy and Python's standard library alone.
    """
    console = Console()
    with clear_errors(console):
        with console.status("loading transformers"):
            from transformers import AutoTokenizer

            from refrag.commands.train import folders
            from refrag.corpus.tokenizing import tokenize_corpus
            from refrag.training.token_files import read_header
        tokenizer = AutoTokenizer.from_pretrained(folders(None, decoder, "tokens")[1])
        files = tokenize_corpus(
            corpus, output, tokenizer, tokens=tokens, other_tokens=valid_tokens, held_out_tokens=held_out_tokens,
            piece_bytes=None if piece_mib is None else piece_mib << 20,
            progress=lambda read: track(console, read, "tokenizing"),
        )  # fmt: skip
        for file in files:
            header = read_header(file)
            size = file.stat().st_size / (1 << 20)
            what = f"{file}: {header['tokens']:,} tokens, {header['documents']:,} documents, {size:.1f} MiB"
            console.print(what, highlight=False, soft_wrap=True)


@data.command()
def glossary(
    output: Annotated[Path, typer.Option(help="Folder for glossary-train.jsonl and glossary-test.jsonl.")],
    packages: Packages = Path("debian-packages"),
    questions: Annotated[int, typer.Option(help="Number of questions, spread evenly over the fields.")] = 24_000,
    passages: Passages = 10,
    hard: Annotated[
        float, typer.Option(help="Fraction of the questions with MiniLM's nearest entries as passages.")
    ] = 0.5,
    unanswerable: Unanswerable = 0.1,
    test: Annotated[float, typer.Option(help="Fraction of the headwords for testing.")] = 0.03,
    held_out_domain: Annotated[
        list[str] | None,
        typer.Option(help="Field for testing only, such as law, medicine or anatomy; may be repeated."),
    ] = None,
    xz: Compressed = False,
    seed: Seed = 0,
) -> None:
    """Make questions about words, such as "What is an abatis?", with ten dictionary entries as passages each.

    The dictionaries are GCIDE, which marks fields such as law and medicine, WordNet and FOLDOC (Debian: dict-gcide,
    dict-wn, dict-foldoc). No headword of a test question is in a training question or its passages.
    """
    console = Console()
    with clear_errors(console):
        with console.status("loading torch and transformers"):
            from transformers import AutoModel, AutoTokenizer

            from refrag import weights
            from refrag.corpus.debian import fetch
            from refrag.corpus.dictionaries import DICTIONARIES, Entry, read_dictionary
            from refrag.corpus.glossary import glossary_questions, select_entries
            from refrag.corpus.questions import QuestionSettings
            from refrag.model import attention
            from refrag.model.inputs import Passage
            from refrag.retrieval.retriever import Retriever
        settings = QuestionSettings(passages, hard, unanswerable, test, tuple(held_out_domain or ()), seed)
        entries: list[Entry] = []
        for name in track(console, DICTIONARIES, "reading dictionaries"):
            with fetch(f"dict-{name}", packages).unpacked() as folder:
                entries += read_dictionary(folder / "usr" / "share" / "dictd", name)
        unknown = set(settings.held_out_domains) - {entry.domain for entry in entries}
        if unknown:
            raise ValueError(f"--held-out-domain: got {', '.join(sorted(unknown))}, but no entry is marked with it")
        encoder = weights.encoder_folder()
        model = AutoModel.from_pretrained(encoder, attn_implementation=attention.NAME, local_files_only=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(encoder, local_files_only=True)

        def embed(texts: Sequence[str]) -> np.ndarray:
            found = Retriever(model, tokenizer, [Passage(text) for text in texts],
                              lambda batches: track(console, batches, "embedding entries, once"))  # fmt: skip
            return found.embeds.numpy()

        sides = glossary_questions(select_entries(entries, questions, settings), embed, settings)
        _write_sides(console, output, "glossary", sides, xz)


@data.command()
def manpages(
    output: Annotated[Path, typer.Option(help="Folder for manpages-train.jsonl and manpages-test.jsonl.")],
    packages: Packages = Path("debian-packages"),
    package: Annotated[
        list[str] | None,
        typer.Option(help="Debian package with manual pages; may be repeated. By default, about sixty packages."),
    ] = None,
    passages: Passages = 10,
    hard: Annotated[
        float, typer.Option(help="Fraction of the questions with passages of the same page or option name.")
    ] = 0.5,
    unanswerable: Unanswerable = 0.1,
    test: Annotated[float, typer.Option(help="Fraction of the pages for testing.")] = 0.03,
    xz: Compressed = False,
    seed: Seed = 0,
) -> None:
    """Make questions about options, such as "In tar, what does --strip-components do?", with ten descriptions each.

    No page of a test question is in a training question or its passages.
    """
    console = Console()
    with clear_errors(console):
        from refrag.corpus.debian import fetch, refuse_held_out
        from refrag.corpus.manual_options import PROGRAMS, option_questions, read_options
        from refrag.corpus.questions import QuestionSettings

        settings = QuestionSettings(passages, hard, unanswerable, test, seed=seed)
        names = list(dict.fromkeys(package or PROGRAMS))
        refuse_held_out(names)
        found = [fetch(name, packages) for name in track(console, names, "downloading packages")]
        options = []
        for one in track(console, found, "reading manual pages"):
            with one.unpacked() as folder:
                options += read_options(folder, one.name)
        if not options:
            raise ValueError(f"--package: {', '.join(names)} describe no option in their manual pages")
        _write_sides(console, output, "manpages", option_questions(options, settings), xz)


def _write_sides(console: Console, output: Path, name: str, sides: Sequence[Sequence[Question]], xz: bool) -> None:
    from refrag.corpus.questions import write_questions

    for side, questions in zip(("train", "test"), sides):
        if not questions:
            raise ValueError(f"{name}: got no {side} questions, needs more entries or another --test")
    for side, questions in zip(("train", "test"), sides):
        path = output / f"{name}-{side}.jsonl{'.xz' * (xz and side == 'train')}"
        write_questions(path, questions)
        what = f"{path}: {len(questions):,} questions, {path.stat().st_size / (1 << 20):.1f} MiB"
        console.print(what, highlight=False, soft_wrap=True)
