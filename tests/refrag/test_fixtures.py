"""Files that users may have from b88c934 still load and give the numbers recorded then."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from refrag import ChunkStore, Passage, PassageEncoder, RefragForCausalLM
from refrag.adapters import load_policy
from refrag.bundle import ModelBundle
from refrag.data.documents import Documents
from refrag.loading import load_model, load_processor, load_trained
from refrag.retrieval.retriever import Retriever
from refrag.training.config_files import read_config
from refrag.training.options import ReconstructOptions
from refrag.training.stages import run_stage
from safetensors.torch import load_file

FIXTURES = Path(__file__).parent / "fixtures"

# As in fixtures/make.py, which can't be imported because it is code for b88c934.
PASSAGES = [
    Passage("The old bridge of Orla was built in 1871, of stone.", "orla"),
    Passage("It rained. The river rose by two feet, and fell again.", "river"),
    Passage("Nobody came."),
]
QUESTION = "When was it built?"


def logits_of(model, processor, store=None):
    return model(prompt=processor([*PASSAGES[:2], QUESTION], expand={2}, store=store)).logits[:, -8:]


@pytest.fixture(scope="module")
def numbers():
    return load_file(FIXTURES / "numbers.safetensors")


@pytest.fixture(scope="module")
def model():
    return load_model(FIXTURES / "model")


@pytest.fixture(scope="module")
def processor():
    return load_processor(FIXTURES / "model")


def close(got, expected):
    return torch.allclose(got, expected, rtol=0, atol=1e-5)


def test_a_saved_model(numbers, model, processor):
    assert close(logits_of(model, processor), numbers["logits"])
    assert model.config.window == 96 and processor.k == 8


def test_a_store(numbers, model, processor):
    encoder = PassageEncoder.from_model(model, processor)
    store = ChunkStore.open(FIXTURES / "store", encoder.fingerprint)
    assert torch.equal(store.get_many(PASSAGES).rows, numbers["embeds"])
    assert store.missing(PASSAGES) == [] and store.passage("orla").text == PASSAGES[0].text
    chunks, rows = encoder.encode(PASSAGES)
    assert close(rows, numbers["embeds"]) and store.chunks(PASSAGES) == chunks
    assert close(logits_of(model, processor, store), numbers["stored_logits"])


def test_an_adapter_and_its_policy(numbers):
    parts = {"encoder": str(FIXTURES / "encoder"), "decoder": str(FIXTURES / "decoder")}
    model, processor, policy = load_trained(FIXTURES / "adapter", **parts)
    assert close(logits_of(model, processor), numbers["logits"])
    for one in (policy, load_policy(FIXTURES / "adapter")):
        assert close(one(numbers["embeds"][None]), numbers["policy_scores"])


@pytest.mark.filterwarnings("ignore:refrag:DeprecationWarning")
def test_a_model_by_torch_save(numbers, processor):
    model = torch.load(FIXTURES / "model.pt", weights_only=False)
    assert type(model) is RefragForCausalLM
    assert close(logits_of(model, processor), numbers["logits"])


def test_the_cache(numbers, model, processor, tmp_path, monkeypatch):
    shutil.copytree(FIXTURES / "cache", tmp_path / "cache")
    monkeypatch.setenv("REFRAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Retriever, "_write", lambda *_: pytest.fail("the entry was not found"))
    monkeypatch.setattr(model.encoder, "name_or_path", "fixture")
    retriever = Retriever(model.encoder, processor.encoder_tokenizer, PASSAGES)
    cosines = [cosine for _, cosine in retriever.rank(QUESTION)]
    assert close(torch.tensor(cosines), numbers["cosines"])


def test_a_checkpoint(tmp_path):
    shutil.copytree(FIXTURES / "checkpoint", tmp_path / "checkpoints" / "step-00000001")
    log = [json.loads(line) for line in (FIXTURES / "checkpoint.log.jsonl").read_text().splitlines()]
    (tmp_path / "log.jsonl").write_text(json.dumps(log[0]) + "\n")
    options = ReconstructOptions(
        data=(), output=tmp_path, k=8, preset="lclm", precision="no",
        **read_config(FIXTURES / "adapter" / "stage.json", ReconstructOptions),
    )  # fmt: skip
    with torch.enable_grad():
        parts = ModelBundle.load(FIXTURES / "encoder", FIXTURES / "decoder", 8, "lclm")
        for module in parts.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        text = parts.tokenizer(" ".join(passage.text for passage in PASSAGES) * 4)["input_ids"]
        documents = Documents(np.array(text * 2), np.array([0, len(text), 2 * len(text)]))
        found = run_stage(parts, options, documents, documents)
    assert [entry["step"] for entry in found] == [1, 2] and found[1]["tokens"] == log[1]["tokens"]
    # One step of Adam from the checkpoint, on samples that are drawn differently today.
    steps = (tmp_path / "checkpoints" / f"step-0000000{step}" / "trained.safetensors" for step in (1, 2))
    before, after = map(load_file, steps)
    assert before.keys() == after.keys()
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert 0 < moved <= 1.5 * options.learning_rate
