"""`refrag data corpus` converts packages to clean text, split by document."""

import gzip
import json
import shutil

import pytest
from refrag.cli import app
from refrag.corpus import build
from refrag.corpus.budget import capped_level, even_level
from refrag.corpus.cleaning import Deduplicator, is_english_prose
from refrag.corpus.debian import Package, PackageError, fetch, licences
from refrag.corpus.texts import read_text, text_files
from typer.testing import CliRunner

from tests.refrag import fake_debian
from tests.refrag.fake_debian import prose

SHARED = (
    "This paragraph is in the handbook as well as in a manual: the two are the same but for spacing and the digit 1."
)


def packages():
    found = {
        f"manual-{name}": {f"usr/share/doc/manual-{name}/{n}.txt": prose(f"{name}{n}word") for n in "abcdefgh"}
        for name in ("red", "green", "blue", "grey")
    }
    found["manual-red"]["usr/share/doc/manual-red/shared.txt"] = f"{prose('crimson')}\n\n{SHARED.replace('1', '2')}"
    found["manual-red"]["usr/share/doc/manual-red/copy.txt"] = prose("redaword")
    found["manual-red"]["usr/share/doc/manual-red/short.txt"] = "The end of it."
    found["manual-red"]["usr/share/doc/manual-red/code.txt"] = "x = y + 1\n" * 400
    for name in ("debian-handbook", "postgresql-doc-15", "perl-doc", "git-doc", "git-man"):
        found[name] = {f"usr/share/doc/{name}/text.txt": f"{prose(name.replace('-', ''))}\n\n{SHARED}"}
    return found


@pytest.fixture
def archive(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return fake_debian.make_archive(tmp_path, packages(), monkeypatch)


def run(*arguments):
    result = CliRunner().invoke(app, ["data", "corpus", "--workers", "1", *map(str, arguments)])
    if result.exit_code not in (0, 2):
        raise result.exception
    return result


def names(*colours):
    return [argument for colour in colours for argument in ("--package", f"manual-{colour}")]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_corpus(archive, tmp_path):
    output = tmp_path / "corpus"
    arguments = [*names("red", "green", "blue", "grey"), "--validation", 0.3, "--cap", 0.3]
    result = run("--output", output, *arguments)
    assert result.exit_code == 0, result.output
    train, valid = read(output / "train.jsonl"), read(output / "valid.jsonl")
    ids = [document["id"] for document in [*train, *valid]]
    assert len(set(ids)) == len(ids) and train and valid
    # 8 + 1 documents of red, without copies, short texts or code; no source reaches the cap.
    assert sum(id.startswith("manual-red/") for id in ids) == 9 and len(ids) == 33
    shared = next(document for document in [*train, *valid] if document["id"].endswith("shared.txt"))
    assert "crimson" in shared["text"] and "spacing" not in shared["text"]
    held_out = read(output / "heldout-git.jsonl")
    assert {document["source"] for document in held_out} == {"git-doc", "git-man"}
    assert {path.name for path in output.iterdir()} == {
        "train.jsonl", "valid.jsonl", "manifest.json",
        *(f"heldout-{name}.jsonl" for name in ("handbook", "postgres", "perl", "git")),
    }  # fmt: skip
    manifest = json.loads((output / "manifest.json").read_text())
    red = manifest["packages"][0]
    assert (red["name"], red["version"], red["licences"]) == ("manual-red", "1:2.0-1", ["Expat", "Artistic", "GPL-2+"])
    assert len(red["sha256"]) == 64 and red["documents"] == 9 and red["files"] == 12
    assert red["dropped"] == {"short or no English prose": 2, "repeated": 1} and red["held_out"] is None
    assert manifest["splits"]["train"]["documents"] == len(train)
    assert {entry["held_out"] for entry in manifest["packages"]} == {None, "handbook", "postgres", "perl", "git"}

    # The same seed gives the same files, a different seed a different split.
    for folder, seed in (("again", 0), ("other", 1)):
        assert run("--output", tmp_path / folder, *arguments, "--seed", seed).exit_code == 0
    assert (tmp_path / "again" / "train.jsonl").read_bytes() == (output / "train.jsonl").read_bytes()
    assert {d["id"] for d in read(tmp_path / "other" / "valid.jsonl")} != {d["id"] for d in valid}


def test_no_source_has_more_than_its_share(archive, tmp_path):
    words = ["more" + "abcdefghij"[n % 10] * (n // 10 + 1) + "x" for n in range(40)]
    more = {f"usr/share/doc/manual-red/{word}.txt": prose(word) for word in words}
    fake_debian.add_package(archive, "manual-red", packages()["manual-red"] | more)
    assert (
        run("--output", "corpus", *names("red", "green", "blue", "grey"), "--no-held-out", "--cap", 0.3).exit_code == 0
    )
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    characters = {entry["name"]: entry["characters"] for entry in manifest["packages"]}
    assert 0.2 < characters["manual-red"] / sum(characters.values()) <= 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--package", "no-such-manual"],
            "no-such-manual: apt-get download failed (E: Unable to locate package no-such",
        ),
        (["--package", "git-man"], "git-man: is held out for evaluation and must not be trained on"),
        (["--package", "postgresql-doc"], "postgresql-doc: is held out"),
        (["--package", "postgresql-doc-15"], "postgresql-doc-15: is held out"),
        (["--package", "../evil"], "../evil: is not the name of a package"),
        (["--cap", "0"], "cap: got 0.0, needs a fraction above 0"),
        (["--validation", "1"], "validation: got 1.0, needs a fraction from 0 up to 1"),
        (
            [*names("red", "green"), "--cap", "0.25"],
            "cap: got 0.25 with 2 sources, needs more sources of similar size",
        ),
        ([*names("red"), "--cap", "1", "--min-characters", "99999"], "none of its 12 files has 99999 characters"),
        (["--output", "."], "--output: . exists, needs a new folder"),
    ],
)
def test_bad_input_is_one_clear_line(archive, tmp_path, arguments, message):
    result = run("--no-held-out", "--output", "corpus", *arguments)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()) and "Traceback" not in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) in (["archive", "programs"],
                                                               ["archive", "debian-packages", "programs"])  # fmt: skip


def test_without_apt(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PackageError, match="manual: needs apt-get, which is not on PATH"):
        fetch("manual", tmp_path / "packages")
    assert list((tmp_path / "packages").iterdir()) == []


def test_a_broken_off_run_leaves_nothing(archive, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "capped_level", lambda sizes, cap: 10**9)
    monkeypatch.setattr(build.json, "dumps", broken)
    with pytest.raises(KeyboardInterrupt):
        build.build_corpus(
            [fetch("manual-red", tmp_path / "p")], {}, build.CorpusSettings(workers=1), tmp_path / "corpus"
        )
    assert not [path for path in tmp_path.iterdir() if "corpus" in path.name]


def test_a_downloaded_package_is_not_downloaded_again(archive, tmp_path):
    first = fetch("manual-red", tmp_path / "packages")
    (archive / first.path.name).unlink()
    assert fetch("manual-red", tmp_path / "packages") == first


def test_licences_of_the_package_that_the_folder_is_of(archive, tmp_path):
    fake_debian.add_package(archive, "data", {"usr/share/doc/data/copyright": "See /usr/share/common-licenses/GPL-2."})
    docs = tmp_path / "tree" / "usr" / "share" / "doc"
    docs.mkdir(parents=True)
    package = Package("manual", "1", tmp_path / "packages" / "manual.deb")
    with pytest.raises(PackageError, match="manual: has no copyright file"):
        licences(package, tmp_path / "tree")
    (docs / "manual").symlink_to("data")
    assert licences(package, tmp_path / "tree") == ["in free form", "GPL-2"]


def test_which_files_hold_text(tmp_path):
    for name in ("doc/m/a.html", "doc/m/genindex.html", "doc/m/_sources/a.rst.txt", "doc/m/de/b.html",
                 "doc/m/en/b.html", "doc/m/x/fr/c.html", "doc/m/changelog.gz", "man/man1/x.1.gz", "man/fr/man1/x.1.gz",
                 "info/x.info.gz", "doc/m/notes.txt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "doc" / "m" / "z.html").symlink_to("a.html")
    found = [(file.name, file.kind) for file in text_files(tmp_path)]
    assert found == [
        ("doc/m/a.html", "html"), ("doc/m/en/b.html", "html"), ("doc/m/x/fr/c.html", "html"),
        ("info/x.info.gz", "info"), ("man/man1/x.1.gz", "man"),
    ]  # fmt: skip


def test_info_and_text(tmp_path):
    (tmp_path / "info").mkdir()
    info = "\x1f\nFile: x.info,  Node: Top\n\n1 Start\n*******\n\nIt begins.\n\n* Menu:\n\n* Next::  more\n\n"
    info += "\x1f\nTag Table:\nNode: T\n"
    (tmp_path / "info" / "x.info.gz").write_bytes(gzip.compress(info.encode()))
    (tmp_path / "info" / "y.info.gz").write_bytes(b"no gzip")
    texts = [read_text(file) for file in text_files(tmp_path)]
    assert texts == ["1 Start\n*******\n\nIt begins.", ""]


def test_html_and_manual_pages(tmp_path):
    pytest.importorskip("resiliparse")
    text = "The text of the page is here, and it is longer than what stands around it in the page. " * 4
    page = f"<html><body><nav><a href='/'>Home</a></nav><main><h1>Title</h1><p>{text}</p></main></body></html>"
    (tmp_path / "a.html").write_text(page)
    (tmp_path / "b.html").write_bytes("<meta charset=iso-8859-1><p>caf\xe9</p>".encode("latin-1"))
    texts = [read_text(file) for file in text_files(tmp_path)]
    assert texts == [f"Title\n\n{text.strip()}", "caf\xe9"]
    if shutil.which("mandoc"):
        (tmp_path / "man" / "man1").mkdir(parents=True)
        (tmp_path / "man" / "man1" / "x.1").write_text(
            ".TH X 1\n.SH NAME\nx \\- make an x\n.SH OPTIONS\n.TP\n.B \\-v\nSay more.\n"
        )
        assert read_text(text_files(tmp_path)[-1]) == "NAME\n\nx - make an x\n\nOPTIONS\n\n-v\nSay more."


def test_without_what_reads_html(tmp_path, monkeypatch):
    (tmp_path / "a.html").touch()
    monkeypatch.setitem(__import__("sys").modules, "resiliparse", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'refrag-kernels\[data\]'"):
        read_text(text_files(tmp_path)[0])


def test_prose():
    assert is_english_prose(prose("text")) and not is_english_prose("") and not is_english_prose("x = y + 1\n" * 10)
    german = "Das Programm kopiert die Datei in einen anderen Ordner, wenn es mit dieser Option aufgerufen wird."
    assert not is_english_prose(german)


def test_paragraphs_are_kept_once():
    once = Deduplicator()
    text = prose("text")
    assert once.fresh(text) == text and once.fresh(f"Title\n\n{text.upper()}") is None
    assert once.fresh(f"{text.split(chr(10))[0]}\n\n{prose('other')}") == prose("other")
    assert once.fresh("source\n\n" * 9 + prose("third")) == "source\n\n" * 3 + prose("third")


def test_levels():
    assert even_level([10, 100, 1000], 130) == 60 and even_level([5, 5], 10) == 5 and even_level([], 0) == 0
    with pytest.raises(ValueError, match="tokens: got 11, the sources have 10 in total"):
        even_level([5, 5], 11)
    sizes = [7, 20, 300, 40, 1000]
    level = capped_level(sizes, 0.3)
    taken = [min(size, level) for size in sizes]
    assert level <= 0.3 * sum(taken) and level + 1 > 0.3 * sum(min(size, level + 1) for size in sizes)
    assert capped_level([5], 1) == 5
