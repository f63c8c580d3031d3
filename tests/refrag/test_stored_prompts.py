"""`refrag encode` and `refrag generate --store`: nothing is encoded twice, and mismatches are refused by name."""

import functools
import json

import pytest
import torch
from refrag import ChunkStore, CosineSelector, Passage, TextEmbedder, loading, weights
from refrag.adapters import TrainableSpec, prepare, save_adapter
from refrag.bundle import ModelBundle
from refrag.cli import app
from refrag.model import encoder, modeling
from typer.testing import CliRunner

PASSAGES = {
    "bridge": "The bridge of Orla was built in 1871 by Ada Lind. It is 40 m long.",
    "bread": "Bread needs flour, water, salt and yeast.\n",
    "rain": "It rained all day.",
}
QUESTION = ("--question", "When was the bridge built?")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "100"})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": text, "id": name}) for name, text in PASSAGES.items()]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    return folder / "corpus.jsonl"


@pytest.fixture(scope="module")
def store(corpus, tmp_path_factory):
    """A store for the default model of `refrag generate`, which has the shipped adapter."""
    folder = tmp_path_factory.mktemp("stores") / "demo"
    result = run("encode", corpus, "--store", folder)
    assert result.exit_code == 0 and "3 passages encoded" in result.output, result.output
    return folder


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """Load the demo's model once, instead of in each command: loading takes half of these tests' time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_model", functools.cache(loading.load_model))
        yield


@pytest.fixture(scope="module")
def demo():
    return loading.load_model(None, None), loading.load_processor(None)


@pytest.fixture
def encoded(monkeypatch):
    """Record the number of texts that the encoder reads."""
    counts = []

    def counting(encoder_, texts, *arguments):
        counts.append(texts.layout.num_chunks)
        return encoder.encode_packed(encoder_, texts, *arguments)

    monkeypatch.setattr(modeling, "encode_packed", counting)
    return counts


def prompt(processor, **options):
    content = []
    for name, text in PASSAGES.items():
        content += [Passage(text, name), "\n\n"]
    return processor(processor.apply_chat_template([{"role": "user", "content": [*content, QUESTION[1]]}]), **options)


def test_answers_from_the_store_equal_those_of_the_encoder(store, corpus, demo, encoded):
    refrag, processor = demo
    expected = refrag.generate(prompt(processor), max_new_tokens=6, do_sample=False)[0]
    assert encoded == [len(prompt(processor).chunks)]
    encoded.clear()
    options = ("generate", *QUESTION, "--store", store, "--max-new-tokens", 6)
    by_text = run(*options, corpus)
    assert by_text.exit_code == 0, by_text.output
    assert by_text.stdout.strip() == processor.tokenizer.decode(expected, skip_special_tokens=True).strip() != ""
    by_id = run(*options, "--id", "bridge", "--id", "bread", "--id", "rain")
    assert by_id.stdout == by_text.stdout
    assert encoded == []
    fingerprint = ChunkStore.open(store).fingerprint
    assert fingerprint.pooling == "concat, 8 segments" and fingerprint.chunker == "fixed, k = 8"
    assert fingerprint.width == refrag.config.chunk_width == 8 * 576


@pytest.mark.parametrize("how", [("cosine", "--expand", 2), ("policy", "--expand", 2), ("threshold", "--threshold", 0)])
def test_selectors_use_the_stored_embeddings(store, corpus, encoded, how):
    plain = run("inspect", *QUESTION, corpus, "--store", store, "--selector", "random", "--expand", 2)
    assert plain.exit_code == 0 and encoded == []
    result = run("inspect", *QUESTION, corpus, "--store", store, "--selector", *how)
    assert result.exit_code == 0, result.output
    assert encoded == ([] if how[0] == "policy" else [1])  # the question


def test_selectors_pick_the_same_with_and_without_a_store(store, demo):
    refrag, processor = demo
    chosen = [
        prompt(processor, expand_count=4, selector=CosineSelector(TextEmbedder(refrag, processor.encoder_tokenizer)),
               store=where)
        for where in (None, ChunkStore.open(store))
    ]  # fmt: skip
    assert chosen[0].expanded == chosen[1].expanded and len(chosen[0].expanded) == 4

    def elsewhere(texts):  # of another model, for which the stored embeddings are meaningless
        return torch.tensor([[float("flour" in text), 1.0] for text in texts])

    picks = prompt(processor, expand_count=1, selector=CosineSelector(elsewhere), store=ChunkStore.open(store))
    assert "flour" not in "".join(picks.chunks[chunk].text for chunk in picks.expanded)


def test_a_batch_with_a_store(store, demo):
    refrag, processor = demo
    selector = CosineSelector(TextEmbedder(refrag, processor.encoder_tokenizer))
    batch = [["Read: ", Passage(text), "When was it built?"] for text in PASSAGES.values()] * 2
    chosen = [processor(batch, expand_count=1, selector=selector, store=one) for one in (None, ChunkStore.open(store))]
    assert chosen[0].expanded == chosen[1].expanded and len(chosen[0].expanded) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--k", 16), "encoder: holds embeddings of bert (revision"),
        (("--k", 16), "chunker: holds fixed, k = 8, got fixed, k = 16"),
        (("--chunker", "sentence"), "chunker: holds fixed, k = 8, got sentence"),
        (("--id", "sun"), "passage id 'sun': is not in store"),
    ],
)
def test_a_mismatching_store_is_refused_by_name(store, corpus, arguments, message):
    result = run("generate", *QUESTION, corpus, "--store", store, *arguments)
    assert result.exit_code == 2 and not result.stdout
    assert message in " ".join(result.stderr.split()), result.stderr


def test_bad_input_gives_a_one_line_error(store, corpus, tmp_path):
    (tmp_path / "other.txt").write_text("The sun shone.")
    for arguments, message in [
        ((corpus, "--id", "rain"), "--id: got rain, needs --store, too"),
        ((), "passages: got none, needs files, or - for standard input, or --id with --store"),
        ((corpus, "--store", tmp_path), "is not a store, it has no store.json"),
        ((tmp_path / "other.txt", "--store", store), "passage 'other.txt': its text is not in store"),
    ]:
        result = run("inspect", *QUESTION, *arguments)
        assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.output


def test_a_stage_with_a_merged_encoder(corpus, tmp_path, tokenizer):
    """The store's revision is the digest of weights that include the low-rank updates."""
    parts = ModelBundle.load(weights.encoder_folder(), weights.decoder_folder(), 8, "lclm")
    trained = prepare(parts.model, TrainableSpec(train_encoder="lora", train_decoder="none", rank=2))
    for name, parameter in trained.encoder.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    save_adapter(trained, tmp_path / "stage")
    result = run("encode", corpus, "--store", tmp_path / "store", "--model", tmp_path / "stage")
    assert result.exit_code == 0, result.output
    refrag, processor, _ = loading.load_trained(tmp_path / "stage")
    stored = ChunkStore.open(tmp_path / "store").get_many([Passage(text) for text in PASSAGES.values()]).rows
    own = refrag.encode_chunks(prompt(processor).encoder_input)
    assert (stored - own).norm() < 1e-5 * own.norm()
    answer = run("inspect", *QUESTION, corpus, "--store", tmp_path / "store", "--model", tmp_path / "stage")
    assert answer.exit_code == 0, answer.output
    # The encoder without the updates has another digest.
    result = run("encode", corpus, "--store", tmp_path / "store", "--preset", "lclm", "--k", 8)
    assert result.exit_code == 2 and "encoder: holds embeddings of" in result.stderr


def test_encode_refuses_options_that_a_stage_determines(corpus, tmp_path):
    (tmp_path / "adapter.safetensors").write_bytes(b"no")
    for arguments, message in [
        (("--k", 4), "--k: got 4 with --model, which determines it"),
        (("--preset", "lclm"), "--preset: got lclm with --model"),
        ((), "can't be read"),
    ]:
        result = run("encode", corpus, "--store", tmp_path / "store", "--model", tmp_path, *arguments)
        assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.output
