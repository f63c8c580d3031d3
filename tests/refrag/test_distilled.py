"""The shipped adapter "distilled": how much its slots retain, and where its name is accepted."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from refrag import GenerationState, Passage, weights
from refrag.adapters import AdapterError, adapter_path, read_adapter
from refrag.bundle import ModelBundle
from refrag.cli import app
from refrag.data.documents import Documents
from refrag.demo.caution import DISTILLED, TRAINED, UNTRAINED, caution
from refrag.integrations.answering import Answerer
from refrag.loading import is_adapter, load_trained, trained_sources
from refrag.training.perplexity import COMPRESSED, FULL, NONE, Conditions, measure, value_kept
from typer.testing import CliRunner

NAME = Path("distilled")
MANUAL = Path(__file__).with_name("manual.txt")  # of a fictional program, so it was in no training data
QUESTION = "What does --dry-run do?"


@pytest.fixture(scope="module")
def trained():
    return load_trained(NAME)


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "100"})


def test_its_slots_keep_a_part_of_a_manual(trained):
    model, processor, _ = trained
    parts = ModelBundle(model, processor.tokenizer, processor.encoder_tokenizer)
    ids = parts.tokenizer(MANUAL.read_text())["input_ids"]
    documents = Documents(np.array(ids), np.array([0, len(ids)]))
    scores = measure(parts, documents, Conditions(context=128, output_tokens=32, rates=()), samples=8)
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    assert means[FULL] < means[COMPRESSED] < means[NONE]
    assert value_kept(means, COMPRESSED) > 0.4  # measured 0.51; the default adapter keeps 0.08, an untrained one 0


def test_where_it_is(tmp_path, monkeypatch):
    shipped = weights.named_adapter("distilled")
    assert shipped is not None and shipped.stat().st_size < 24e6
    about = read_adapter("distilled")[0]
    assert about["fields"]["chunk_size"] == 8 and about["fields"]["encoder_window"] == 512
    # It refers to the demo's decoder wherever that is, not to a folder of the machine that trained it.
    assert about["sources"] == {"encoder": "", "decoder": ""}
    assert trained_sources(NAME) == (None, str(weights.decoder_folder()))
    assert adapter_path(NAME) == adapter_path(shipped) == shipped and is_adapter(NAME) and is_adapter(shipped)
    # A user's folder with that name takes precedence; other names are not shipped.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "distilled").mkdir()
    assert not is_adapter(NAME)
    shutil.copy(weights.adapter_file(8), tmp_path / "distilled" / "adapter.safetensors")
    assert read_adapter(NAME)[0]["decoder"] == about["decoder"] and "policy" in read_adapter(NAME)[0]
    assert caution(NAME, 8) is None
    (tmp_path / "notes.txt").write_text("no adapter")
    assert not any(map(is_adapter, (Path("notes.txt"), Path("8"), Path("condensed"), None)))
    with pytest.raises(AdapterError, match=r"adapter condensed: can't be read"):
        read_adapter("condensed")


def test_the_caution_says_which_adapter_answered():
    assert caution(None, 8) == TRAINED and caution(None, 7) == UNTRAINED
    assert caution(NAME, 8) == DISTILLED and caution(weights.named_adapter("distilled"), 8) == DISTILLED


def test_chunks_are_expanded_after_reading(trained):
    model, processor, policy = trained
    assert policy is None
    state = GenerationState()
    prompt = processor([Passage(MANUAL.read_text()[:400], "manual"), QUESTION])
    model.generate(prompt, state=state, max_new_tokens=2, do_sample=False)
    rows = state.rows
    model.expand(state, "manual")
    assert state.rows - rows == 1 + len(state.tokens_of("manual"))
    assert model.generate(state=state, max_new_tokens=2, do_sample=False).numel()


def test_from_a_store_it_answers_the_same(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("refrag.loading.load_trained", lambda *_, **__: trained)
    monkeypatch.setattr("refrag.encoding.encode_job.load_trained", lambda *_, **__: trained)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "manual.txt").write_text(MANUAL.read_text()[:600])
    store = tmp_path / "store"
    filled = run("encode", tmp_path / "texts", "--model", NAME, "--store", store)
    assert filled.exit_code == 0 and "1 passages encoded" in filled.output, filled.output
    asked = ("generate", "--question", QUESTION, "--model", NAME, "--max-new-tokens", 4, "--store", store)
    stored = run(*asked, tmp_path / "texts")
    assert stored.exit_code == 0 and stored.stdout.strip(), stored.output
    assert DISTILLED in stored.stderr
    chosen = run(*asked, tmp_path / "texts", "--expand", "3")  # by cosine, since it has no policy
    assert chosen.exit_code == 0 and re.search(r"3 of \d+ chunks", chosen.stderr), chosen.output
    other = run("generate", "--question", QUESTION, "--store", store, tmp_path / "texts")
    assert other.exit_code == 2 and "encoder: holds embeddings of" in " ".join(other.stderr.split()), other.output
    policy = run("inspect", "--question", QUESTION, MANUAL, "--model", NAME, "--selector", "policy", "--expand", "3")
    assert policy.exit_code == 2 and "--policy: got None, needs the folder" in policy.stderr
    wrong = run("inspect", "--question", QUESTION, MANUAL, "--model", "condensed")
    assert wrong.exit_code == 2 and "--model: condensed has no refrag_processor.json" in wrong.stderr


def test_it_is_evaluated_by_its_name(tmp_path):
    result = run("eval", "perplexity", "--adapter", NAME, "--data", f"manual={MANUAL}", "--output", tmp_path,
                 "--context", 64, "--output-tokens", 8, "--samples", 1, "--selectors", "cosine")  # fmt: skip
    assert result.exit_code == 0, result.output
    table = (tmp_path / "perplexity.md").read_text()
    assert "| compressed |" in table and "| cosine, 4x |" in table and "policy" not in table


def test_an_answerer_takes_its_name(trained, monkeypatch):
    monkeypatch.setattr("refrag.integrations.answering.load_trained", lambda *_, **__: trained)
    answerer = Answerer.from_pretrained("distilled", max_new_tokens=2)
    assert answerer.answer(QUESTION, [Passage(MANUAL.read_text()[:300])]) is not None
