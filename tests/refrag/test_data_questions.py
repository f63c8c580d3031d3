"""`refrag data glossary` and `refrag data manpages` write questions over passages, split by headword and page."""

import base64
import gzip
import json
import lzma

import numpy as np
import pytest
from refrag.cli import app
from refrag.commands.train import read_questions
from refrag.corpus import manual_options
from refrag.corpus.dictionaries import Entry, read_dictionary
from refrag.corpus.glossary import glossary_questions, question_text, select_entries
from refrag.corpus.manual_options import Option, option_questions, read_options
from refrag.corpus.questions import UNANSWERED, QuestionSettings, write_questions
from typer.testing import CliRunner

from tests.refrag import fake_debian

GCIDE = {
    "Abatis": """Abatis \\Ab"a*tis\\, Abattis \\Aba"t*tis\\, ([a^]b"[.a]*t[i^]s;
   French [.a]`b[.a]`t[=e]") n. [F. abatis, abattis, mass of
   things beaten or cut down, fr. abattre. See {Abate}.] (Fort.)
   A means of defense formed by felled trees, the ends of whose
   branches are sharpened and directed outwards, or against the
   enemy.
   [1913 Webster]
""",
    "Tort": """Tort \\Tort\\, n. [F., from LL. tortum, fr. L. tortus twisted.
   See {Torture}.]
   1. Mischief; injury; calamity. [Obs.]
      [1913 Webster]

            That had them long opprest with tort. --Spenser.
      [1913 Webster]

   2. (Law) Any civil wrong or injury; a wrongful act (not
      involving a breach of contract) for which an action will
      lie.
      [1913 Webster]
""",
    "Femur": """Femur \\Fe"mur\\ (f[=e]"m[u^]r), n. [L. thigh.] (Anat.)
   (a) The thigh bone of an animal.
   (b) The proximal segment of the hind limb.
       [1913 Webster]
""",
    "Abature": """Abature \\Ab"a*ture\\ ([.a]b"[.a]*t[-u]r; 135), n. [F. abatture,
   fr. abattre. See {Abate}.]
   Grass and sprigs beaten or trampled down by a stag passing
   through them. --Crabb.
   [1913 Webster]
""",
    "Abba": 'Abba \\Ab"ba\\, n.\n   See {Abbot}.\n   [1913 Webster]\n',
}
WN = {
    "acrolein": """acrolein
    n 1: a pungent colorless unsaturated liquid aldehyde made from
         propene [syn: {propenal}, {acrolein}]
""",
    "appall": """appall
    v 1: strike with disgust or revulsion; "The behavior of this
         married woman shocked her friends" [syn: {shock}]
    2: fill with apprehension or alarm; cause to be unpleasantly
       surprised
""",
}
FOLDOC = {
    "ARCnet": """ARCnet

   <networking> A {network} developed by {DataPoint}.  ARCnet was
   {proprietary} until the late 1980s.

   (1995-01-16)
""",
}


def number(value):
    """Encode a number as in dictd's indexes, in base 64."""
    return base64.b64encode(value.to_bytes(6, "big")).decode().lstrip("A") or "A"


def dictionary(name, entries):
    content, index = b"", ["00-database-info\tA\tA"]
    for word, text in entries.items():
        index.append(f"{word}\t{number(len(content))}\t{number(len(text.encode()))}")
        content += text.encode()
    folder = "usr/share/dictd"
    return {f"{folder}/{name}.index": "\n".join(index) + "\n", f"{folder}/{name}.dict.dz": gzip.compress(content)}


def write(folder, name, entries):
    for path, content in dictionary(name, entries).items():
        (folder / path.rsplit("/", 1)[1]).write_bytes(content if isinstance(content, bytes) else content.encode())


def test_gcide(tmp_path):
    write(tmp_path, "gcide", GCIDE)
    entries = {entry.headword: entry for entry in read_dictionary(tmp_path, "gcide")}
    assert list(entries) == ["Abatis", "Tort", "Femur", "Abature"]  # a reference is not a definition
    assert entries["Abatis"].definition.startswith(
        "A means of defense formed by felled trees, the ends of whose branches"
    )
    tort = entries["Tort"]
    assert (tort.kind, tort.domain) == ("noun", "law") and tort.definition.startswith(
        "Any civil wrong or injury; a wrongful"
    )
    assert tort.text.startswith("1. Mischief; injury; calamity. 2. (Law) Any civil wrong")
    assert (entries["Femur"].domain, entries["Femur"].definition) == ("anatomy", "The thigh bone of an animal")
    assert entries["Abature"].text.endswith("a stag passing through them.")
    questions = [question_text(entry) for entry in entries.values()]
    assert questions[:3] == [
        "What is an abatis?",
        'In law, what does "tort" mean?',
        'In anatomy, what does "femur" mean?',
    ]


def test_the_passage_holds_the_answer(tmp_path):
    senses = "".join(f"   {n}. A sense of the word which is the one of number {n}.\n\n" for n in range(1, 12))
    entry = f"Staff \\Staff\\, n. [AS.]\n{senses}   12. (Mus.) The five lines on which music\n       is written.\n"
    write(tmp_path, "gcide", {"Staff": entry, "Stave": entry.replace("Staff", "Stave").replace("(Mus.) ", "")})
    staff, stave = read_dictionary(tmp_path, "gcide")
    assert (staff.definition, staff.domain) == ("The five lines on which music is written", "music")
    assert staff.text == "The five lines on which music is written."
    assert stave.text.startswith("1. A sense of the word") and stave.text.endswith("number 5.")


def test_wordnet_and_foldoc(tmp_path):
    write(tmp_path, "wn", WN)
    write(tmp_path, "foldoc", FOLDOC)
    acrolein, appall = read_dictionary(tmp_path, "wn")
    assert acrolein.definition == "a pungent colorless unsaturated liquid aldehyde made from propene"
    assert (appall.kind, appall.definition) == ("verb", "strike with disgust or revulsion")
    assert "fill with apprehension" in appall.text
    (arcnet,) = read_dictionary(tmp_path, "foldoc")
    assert (arcnet.definition, arcnet.domain) == ("A network developed by DataPoint", "computing")
    assert [question_text(entry) for entry in (acrolein, appall, arcnet)] == [
        "What is an acrolein?", 'What does "appall" mean?', "What is an ARCnet?",
    ]  # fmt: skip


def test_dictionaries_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="gcide.index: doesn't exist, needs dictionary gcide"):
        read_dictionary(tmp_path, "gcide")
    write(tmp_path, "gcide", GCIDE)
    (tmp_path / "gcide.dict.dz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="or gcide.dict.dz is damaged"):
        read_dictionary(tmp_path, "gcide")
    write(tmp_path, "gcide", GCIDE)
    (tmp_path / "gcide.index").write_text("a line without numbers\n")
    with pytest.raises(ValueError, match="gcide.index: is not the index"):
        read_dictionary(tmp_path, "gcide")


def entries(count=200):
    """Return entries in clusters of ten similar ones, one each in law; every fifth headword is in two dictionaries."""
    made = []
    for n in range(count):
        domain = "law" if n % 10 == 3 else "general"
        made.append(
            Entry(f"word{n}", f"a thing of kind {n // 10} that is {n}", f"a thing number {n}", "noun", domain, "gcide")
        )
        if n % 5 == 0:
            made.append(Entry(f"Word{n}", f"another kind of {n}", f"another thing number {n}", "noun", "general", "wn"))
    return made


def embed(texts):
    """Return vectors that are similar within a cluster."""
    numbers = np.array([int("".join(filter(str.isdigit, text.split(":")[0]))) for text in texts], dtype=np.float64)
    angles = 2 * np.pi * (numbers // 10 + numbers % 10 / 100) / 40
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def headword(passage):
    return passage.split(":")[0].lower()


def test_glossary():
    settings = QuestionSettings(passages=5, test=0.2, unanswerable=0.2, hard=0.5, seed=1)
    train, test = glossary_questions(entries(), embed, settings)
    assert len(train) + len(test) == 240 and 20 < len(test) < 80
    train_words = {headword(passage) for question in train for passage in question.passages}
    test_words = {f"word{''.join(filter(str.isdigit, question.question))}" for question in test}
    assert test_words and not train_words & test_words
    unanswered = alike = 0
    for question in [*train, *test]:
        word = "word" + "".join(filter(str.isdigit, question.question))
        assert len(question.passages) == len(set(question.passages)) == 5
        if question.gold < 0:
            unanswered += 1
            assert question.answer == UNANSWERED and word not in map(headword, question.passages)
        else:
            assert [headword(passage) for passage in question.passages].count(word) == 1
            assert headword(question.passages[question.gold]) == word
        tens = {int(headword(passage)[4:]) // 10 for passage in question.passages}
        alike += max(tens) - min(tens) <= 2
    assert 0.1 < unanswered / 240 < 0.3 and 0.35 < alike / 240 < 0.65
    assert len({question.gold for question in train}) == 6  # at any position, or absent
    assert len({question.source for question in train[:20]}) == 2  # in random order
    assert glossary_questions(entries(), embed, settings) == (train, test)
    assert glossary_questions(entries(), embed, QuestionSettings(passages=5, test=0.2, seed=2)) != (train, test)


def test_a_domain_is_held_out_whole():
    settings = QuestionSettings(passages=5, held_out_domains=("law",))
    train, test = glossary_questions(entries(), embed, settings)
    law = {f"word{n}" for n in range(3, 200, 10)}
    assert {question.domain for question in train} == {"general"}
    assert not law & {headword(passage) for question in train for passage in question.passages}
    assert sum(question.domain == "law" for question in test) == 20


def test_entries_of_all_domains_are_selected():
    chosen = select_entries(entries(), 90, QuestionSettings())
    counts = {key: sum((entry.source, entry.domain) == key for entry in chosen) for key in
              (("gcide", "law"), ("gcide", "general"), ("wn", "general"))}  # fmt: skip
    assert counts == {("gcide", "law"): 20, ("gcide", "general"): 35, ("wn", "general"): 35}
    with pytest.raises(ValueError, match="questions: got 999, the dictionaries have 240"):
        select_entries(entries(), 999, QuestionSettings())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passages": 1}, "passages: got 1, needs 2 or more"),
        ({"hard": 1.0}, "hard: got 1.0, needs a fraction"),
        ({"test": -0.1}, "test: got -0.1, needs a fraction"),
        ({"unanswerable": 2}, "unanswerable: got 2, needs a fraction"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        QuestionSettings(**options)


def test_too_few_passages():
    with pytest.raises(ValueError, match="passages: got 300, needs more than"):
        glossary_questions(entries(), embed, QuestionSettings(passages=300, hard=0, unanswerable=0))


def options():
    return [
        Option(
            f"tool{page}",
            (f"-{n}", f"--option-{n}"),
            f"-{n}, --option-{n}",
            f"Do thing {n} of tool {page}. And more.",
            "p",
        )
        for page in range(20)
        for n in range(8)
    ]


def test_options():
    settings = QuestionSettings(passages=6, test=0.3, seed=3)
    train, test = option_questions(options(), settings)
    assert len(train) + len(test) == 160 and test

    def page(text):
        return text.split()[0]

    test_pages = {question.question.split()[1].rstrip(",") for question in test}
    assert not test_pages & {page(passage) for question in train for passage in question.passages}
    for question in [*train, *test]:
        asked = question.question.split()
        own = [p for p in question.passages if page(p) == asked[1].rstrip(",") and asked[4] in p]
        assert len(own) == (question.gold >= 0) and len(set(question.passages)) == 6
        if own:
            assert question.passages[question.gold] == own[0] and question.answer[:-1] in own[0]
    assert train[0].question.startswith("In tool") and train[0].question.endswith("do?")


def test_options_of_a_page(tmp_path, monkeypatch):
    pytest.importorskip("resiliparse")
    html = """<dl class="Bl-tag"><dt><a href="#x"><b>-x</b>, <b>--extract</b>=<i>FILE</i></a></dt>
      <dd>Take files out of <i>FILE</i>. The rest stays.</dd><dt>word</dt><dd>No option.</dd></dl>
      <p class="Pp">--quiet</p><div class="Bd-indent">Say nothing at all.</div><p class="Pp">-5 is a number</p>
      <p>More.</p>"""
    monkeypatch.setattr(manual_options, "manual_html", lambda content: html.encode())
    (tmp_path / "man" / "man1").mkdir(parents=True)
    (tmp_path / "man" / "man1" / "tool.1.gz").write_bytes(gzip.compress(b".TH"))
    (tmp_path / "man" / "man5").mkdir()
    (tmp_path / "man" / "man5" / "tool.conf.5").write_bytes(b".TH")
    extract, quiet = read_options(tmp_path, "tools")
    assert (extract.page, extract.names, extract.source) == ("tool", ("-x", "--extract"), "tools")
    assert extract.passage == "tool -x, --extract=FILE: Take files out of FILE. The rest stays."
    assert (quiet.names, quiet.text) == (("--quiet",), "Say nothing at all.")


def test_questions_are_written_and_read(tmp_path):
    train, _ = option_questions(options(), QuestionSettings(passages=6))
    for name in ("q.jsonl", "q.jsonl.xz"):
        write_questions(tmp_path / name, train)
        assert [question["answer"] for question in read_questions(tmp_path / name)] == [
            question.answer for question in train
        ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q.jsonl", "q.jsonl.xz"]
    first = json.loads(lzma.open(tmp_path / "q.jsonl.xz").readline())
    assert list(first) == ["question", "answer", "passages", "gold", "domain", "source"]


def test_the_glossary_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = {f"{letter}{n}ness": f"{letter}{n}ness\n    n 1: the {n} state of being {letter} in some way\n"
             for letter in "abcdefgh" for n in range(5)}  # fmt: skip
    found = {f"dict-{name}": dictionary(name, content) for name, content in
             (("gcide", GCIDE), ("wn", {**WN, **words}), ("foldoc", FOLDOC))}  # fmt: skip
    fake_debian.make_archive(tmp_path, found, monkeypatch)
    arguments = ["data", "glossary", "--questions", "40", "--passages", "4", "--test", "0.3", "--output", "out", "--xz"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    questions = read_questions(tmp_path / "out" / "glossary-train.jsonl.xz")
    questions += read_questions(tmp_path / "out" / "glossary-test.jsonl")
    assert len(questions) == 40 and {question["source"] for question in questions} == {"gcide", "wn", "foldoc"}
    for extra, message in (
        (["--held-out-domain", "alchemy"], "--held-out-domain: got alchemy, but no entry is marked with it"),
        (["--questions", "9999"], "questions: got 9,999, the dictionaries have"),
        (["--test", "0"], "glossary: got no test question"),
    ):
        result = CliRunner().invoke(app, [*arguments[:-3], "--output", "bad", *extra])
        assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.output
    assert not (tmp_path / "bad").exists()


def test_the_manpages_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake_debian.make_archive(tmp_path, {"tools": {"usr/share/man/man1/x.1": ".TH"}}, monkeypatch)
    monkeypatch.setattr(manual_options, "read_options", lambda folder, name: options())
    arguments = ["data", "manpages", "--output", "out", "--package"]
    result = CliRunner().invoke(app, [*arguments, "tools", "--test", "0.3"])
    assert result.exit_code == 0, result.output
    assert len(read_questions(tmp_path / "out" / "manpages-train.jsonl")) > 80
    monkeypatch.setattr(manual_options, "read_options", lambda folder, name: [])
    for name, message in (("tools", "--package: tools describe no option"), ("git-man", "git-man: is held out")):
        result = CliRunner().invoke(app, [*arguments, name])
        assert result.exit_code == 2 and message in " ".join(result.stderr.split())
