"""`refrag encode`, `generate` and `inspect` with --slots kv, run as by a user."""

import functools
import json
import pickle

import pytest
import torch
from refrag import KVFingerprint, KVStore, Passage, RefragConfig, RefragForCausalLM, RefragProcessor, SlotRule, loading
from refrag.cli import app
from refrag.data.sources import slices
from refrag.encoding import ray_engine
from refrag.encoding.encode_job import EncodeJob
from transformers import BertConfig, LlamaConfig
from typer.testing import CliRunner

from tests.refrag import tiny

TEXTS = {
    "bridge": "The bridge of Orla was built in 1871 by Ada Lind. It is 40 m long.",
    "bread": "Bread needs flour, water, salt and yeast.",
}
QUESTION = ("--question", "When was the bridge built?")
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    file.write_text("\n".join(json.dumps({"text": text, "id": name}) for name, text in TEXTS.items()))
    return file


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer, encoder_tokenizer):
    """A tiny random model for embedding slots, saved as by a user."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    decoder = LlamaConfig(**SMALL, vocab_size=len(tokenizer), max_position_embeddings=256, eos_token_id=2)
    config = RefragConfig.from_preset(
        "lclm", decoder, BertConfig(**SMALL, vocab_size=len(encoder_tokenizer)), chunk_size=4
    )
    model = RefragForCausalLM(config)
    tiny._spread(model.decoder)
    model.save_pretrained(folder)
    RefragProcessor.from_config(config, tokenizer, encoder_tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("full", [(), ("--full-rows",)])
def test_answers_from_a_store(saved, corpus, tmp_path, full):
    store, slots = tmp_path / "store", ("--slots", "kv", "--slot-whole", "1", "--model", saved)
    result = run("encode", corpus, "--store", store, "--dtype", "float32", *slots, *full)
    assert result.exit_code == 0 and "2 passages encoded" in result.output, result.output
    result = run("encode", corpus, "--store", store, *slots, *full)
    assert "0 passages encoded, 2 skipped" in result.output, result.output
    held = KVStore.open(store)
    assert held.full == bool(full) and held.fingerprint.slot_rule == SlotRule(1, "received", 1)
    options = (*QUESTION, *slots, "--expand", "3", "--store", store, "--id", "bridge", "--id", "bread")
    generated = run("generate", *options, "--max-new-tokens", "4")
    assert generated.exit_code == 0 and "5 of" in generated.stderr.replace("\n", " "), generated.output
    drawn = run("inspect", *options)
    assert drawn.exit_code == 0 and "chunks expanded" in drawn.output, drawn.output
    assert (
        "slots of keys and values: 1 row of each chunk, the most received, the last 1 of a passage whole"
        in drawn.output
    )
    assert "Slots of keys and values keep the gist" in generated.stderr.replace("\n", " ")
    chosen = run("inspect", *options, "--selector", "attention")
    assert chosen.exit_code == 0 and chosen.output.count("expanded") == 1, chosen.output
    # From the files, without a store, the answer is the same.
    files = run("generate", *QUESTION, *slots, "--expand", "3", corpus, "--store", store, "--max-new-tokens", "4")
    assert files.exit_code == 0 and files.stdout == generated.stdout


def test_a_worker_of_ray_fills_the_store(saved, corpus, tmp_path):
    """What each worker does, in this process: the job and the slices arrive pickled."""
    job = pickle.loads(pickle.dumps(EncodeJob(tmp_path / "store", saved, kv_slots=SlotRule(2), full_rows=True)))
    parts = [{"slice": [pickle.dumps(part)]} for part in slices([corpus], 1)]
    worker = ray_engine._Worker(job)
    steps = [pickle.loads(result) for part in parts for result in worker(part)["result"]]
    assert [(step.new, step.known) for step in steps] == [(1, 0), (1, 0)]
    held = KVStore.open(tmp_path / "store")
    assert sorted(held.ids()) == sorted(TEXTS) and held.full and held.fingerprint.rows == 2


def test_a_model_saved_with_kv_slots(saved, corpus, tmp_path, tokenizer, encoder_tokenizer):
    model = RefragForCausalLM.from_pretrained(saved)
    model.config.use_kv_slots(SlotRule(2, "distinct"))
    model.save_pretrained(tmp_path / "kv")
    RefragProcessor.from_config(model.config, tokenizer, encoder_tokenizer).save_pretrained(tmp_path / "kv")
    again = RefragForCausalLM.from_pretrained(tmp_path / "kv")
    assert again.config.kv_slots == SlotRule(2, "distinct") and again.config.decoder_mask == "passages"
    result = run("encode", corpus, "--store", tmp_path / "store", "--model", tmp_path / "kv")
    assert result.exit_code == 0 and KVStore.open(tmp_path / "store").dtype == torch.bfloat16, result.output
    options = ("--model", tmp_path / "kv", "--store", tmp_path / "store", "--id", "bridge")
    result = run("generate", *QUESTION, *options, "--max-new-tokens", "2")
    assert result.exit_code == 0, result.output
    result = run("generate", *QUESTION, *options, "--slots", "embedding")
    assert result.exit_code == 2 and "--slots: got embedding, but" in result.stderr
    result = run("generate", *QUESTION, *options, "--slots", "kv")
    assert result.exit_code == 2 and "rule: holds distinct, got received; rows: holds 2, got 1" in result.stderr


def test_the_demos_decoder_as_it_comes(corpus, tmp_path, monkeypatch):
    """SmolLM2 with real weights: the store's answer equals that of the passages read anew."""
    monkeypatch.setattr(loading, "load_kv_model", functools.cache(loading.load_kv_model))
    monkeypatch.setattr("refrag.encoding.encode_job.load_kv_model", loading.load_kv_model)
    result = run("encode", corpus, "--store", tmp_path, "--slots", "kv", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    rule = SlotRule()
    model, processor = loading.load_kv_model(None, None, rule), loading.load_kv_processor(None, None, rule)
    assert processor.k == 8
    fingerprint = KVFingerprint.of(model.decoder, processor, rule, processor.shared_text())
    store = KVStore.open(tmp_path, fingerprint)
    parts = [part for name in TEXTS for part in (Passage(TEXTS[name], name), "\n\n")]
    prompt = processor.apply_chat_template([{"role": "user", "content": [*parts, QUESTION[1]]}])
    read = model.generate(processor(prompt), max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(processor(prompt, store=store), max_new_tokens=8, do_sample=False), read)
    result = run("generate", *QUESTION, "--slots", "kv", "--store", tmp_path, "--id", "bridge", "--id", "bread",
                 "--max-new-tokens", "8")  # fmt: skip
    assert (
        result.exit_code == 0
        and result.stdout.strip() == processor.tokenizer.decode(read[0], skip_special_tokens=True).strip()
    ), result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--slots", "rows"), "--slots: got 'rows', needs embedding or kv"),
        (("--slot-rows", "2"), "--slot-rows: got 2, needs --slots kv, too"),
        (("--slots", "kv", "--slot-rows", "0"), "--slot-rows: got 0"),
        (("--slots", "kv", "--slot-rows", "5"), "rows: got 5, needs 1 to the chunk_size of 4"),
        (("--slots", "kv", "--slot-rule", "norm"), "--slot-rule: got 'norm', needs one of received, distinct"),
        (("--slots", "kv", "--slot-whole", "-1"), "--slot-whole: got -1"),
    ],
)
def test_bad_options_give_a_one_line_error(saved, corpus, tmp_path, arguments, message):
    for command in (
        ("generate", *QUESTION, corpus),
        ("inspect", *QUESTION, corpus),
        ("encode", corpus, "--store", tmp_path),
    ):
        result = run(*command, "--model", saved, *arguments)
        assert result.exit_code == 2 and message in result.stderr.replace("\n", ""), result.output


def test_encode_refuses(saved, corpus, tmp_path):
    for arguments, message in (
        (("--full-rows",), "--full-rows: needs --slots kv, too"),
        (("--dtype", "float8"), "--dtype: got 'float8', needs one of float32, bfloat16, float16"),
        (("--slots", "kv", "--dtype", "float64"), "needs one of bfloat16, float16, float32, float8"),
    ):
        result = run("encode", corpus, "--store", tmp_path / "none", "--model", saved, *arguments)
        assert result.exit_code == 2 and message in result.stderr.replace("\n", ""), result.output
    with pytest.raises(ValueError, match="--preset: got lclm with --slots kv"):
        EncodeJob(tmp_path, preset="lclm", kv_slots=SlotRule())
    store = ("--store", tmp_path / "store", "--model", saved, "--slots", "kv")
    assert run("encode", corpus, *store).exit_code == 0
    for arguments, message in (
        (("--full-rows",), "--full-rows: got True, but the store"),
        (("--dtype", "float8"), "--dtype: got float8, but the store"),
        (("--slot-rule", "distinct"), "rule: holds received, got distinct"),
    ):
        result = run("encode", corpus, *store, *arguments)
        assert result.exit_code == 2 and message in result.stderr.replace("\n", ""), result.output
    result = run("generate", *QUESTION, "--model", saved, "--store", tmp_path / "store", "--id", "bridge")
    assert result.exit_code == 2 and "holds keys and values, needs embeddings" in result.stderr.replace("\n", "")
