"""`refrag encode` from the command line, and on Ray if it is installed."""

import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from refrag import (
    ChunkStore,
    Passage,
    PassageEncoder,
    RefragConfig,
    RefragForCausalLM,
    RefragProcessor,
    weights,
)
from refrag.cli import app
from refrag.encoding.encode_job import EncodeJob
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel
from typer.testing import CliRunner

from tests.refrag import tiny

PASSAGES = [Passage(f"Passage {number} tells of the number {number * 17}. " * (1 + number % 5), f"p{number}")
            for number in range(20)]  # fmt: skip


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory, encoder_tokenizer):
    """A small random encoder with a real tokenizer, for fast encoding."""
    folder = tmp_path_factory.mktemp("encoder")
    config = BertConfig(**{**tiny._ENCODER, "vocab_size": len(encoder_tokenizer)})
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    encoder_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, encoder_folder, tokenizer, encoder_tokenizer):
    """A whole model and its processor, saved as by a user."""
    folder = tmp_path_factory.mktemp("model")
    config = type(tiny.DECODERS["llama"])(**{**tiny._DECODER, "vocab_size": len(tokenizer)})
    model = RefragForCausalLM.from_parts(
        AutoModel.from_pretrained(encoder_folder), AutoModelForCausalLM.from_config(config), 8, preset="lclm"
    )
    model.save_pretrained(folder)
    RefragProcessor.from_config(model.config, tokenizer, encoder_tokenizer, chunker="sentence").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(encoder_folder, encoder_tokenizer):
    """The encoder that the command should use; its tokenizer replaces the decoder's, which loads slowly."""
    encoder = AutoModel.from_pretrained(encoder_folder, attn_implementation="refrag").eval()
    config = RefragConfig.from_preset("paper", tiny.DECODERS["llama"], encoder.config, chunk_size=8)
    return PassageEncoder(encoder, RefragProcessor.from_config(config, encoder_tokenizer, encoder_tokenizer), config)


@pytest.fixture
def corpus(tmp_path):
    lines = [json.dumps({"text": passage.text, "id": passage.id}) for passage in PASSAGES]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    return tmp_path / "corpus.jsonl"


@pytest.fixture
def run(tmp_path, encoder_folder):
    def run(*arguments, encoder=True):
        options = ["--encoder", encoder_folder, "--decoder", encoder_folder, "--k", "8"] if encoder else []
        arguments = ["encode", "--store", tmp_path / "store", *options, *arguments]
        return CliRunner().invoke(app, [str(one) for one in arguments], env={"COLUMNS": "100"})

    return run


def check(folder, encoder, passages=PASSAGES, dtype=torch.float32):
    """Check that the store holds these passages with the encoder's embeddings."""
    store = ChunkStore.open(folder, encoder.fingerprint)
    assert len(store) == len(passages) and store.dtype == dtype
    chunks, rows = encoder.encode(passages)
    assert store.chunks([Passage(id=passage.id) for passage in passages]) == chunks
    embeds = store.get_many(passages).rows
    assert (embeds - rows).norm() <= (1e-5 if dtype == torch.float32 else 4e-3) * rows.norm()


def test_json_lines_shards_and_resume(run, corpus, tmp_path, expected):
    result = run(corpus, "--shard-passages", "6")
    assert result.exit_code == 0, result.output
    assert "encoding 20 passages" in result.output and "20 passages encoded, 0 skipped" in result.output
    assert len(list((tmp_path / "store").glob("shard-*"))) == 4
    check(tmp_path / "store", expected)
    with corpus.open("a") as file:
        file.write('\n{"text": "One more.", "id": "more"}\n{"text": "One more.", "id": "p3"}\n')
    result = run(corpus)
    assert "1 passages encoded, 21 skipped" in result.output and "1 ids now refer to another text" in result.output
    assert len(list((tmp_path / "store").glob("shard-*"))) == 5
    store = ChunkStore.open(tmp_path / "store", expected.fingerprint)
    assert store.passage("p3").text == store.passage("more").text == "One more." and len(store) == 21


def test_encoding_resumes_after_an_error(run, corpus, tmp_path, expected):
    lines = corpus.read_text().split("\n")
    corpus.write_text("\n".join([*lines[:13], '{"text": ""}', *lines[13:]]))
    result = run(corpus, "--shard-passages", "6")
    assert result.exit_code == 2 and f"{corpus}:14: text is empty" in result.stderr.replace("\n", "")
    check(tmp_path / "store", expected, PASSAGES[:12])
    result = run(corpus, "--shard-passages", "6", "--skip-bad")
    assert result.exit_code == 0 and "8 passages encoded, 12 skipped" in result.output
    assert "1 records skipped:" in result.output and "corpus.jsonl:14: text is empty" in result.output
    check(tmp_path / "store", expected)


def test_parquet_and_a_folder(run, tmp_path, expected):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"body": passage.text, "name": passage.id} for passage in PASSAGES[:10]]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=4)
    (tmp_path / "texts").mkdir()
    for passage in PASSAGES[10:]:
        (tmp_path / "texts" / f"{passage.id}.md").write_text(passage.text)
    result = run(tmp_path / "a.parquet", "--text-field", "body", "--id-field", "name", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    result = run(tmp_path / "texts", "--pattern", "*.md", "--batch-tokens", "64")
    assert result.exit_code == 0 and "10 passages encoded" in result.output
    named = [*PASSAGES[:10], *(Passage(passage.text, f"{passage.id}.md") for passage in PASSAGES[10:])]
    check(tmp_path / "store", expected, named, torch.bfloat16)


def test_a_saved_model(run, corpus, tmp_path, model_folder):
    result = run(corpus, "--model", model_folder, encoder=False)
    assert result.exit_code == 0, result.output
    model, processor = RefragForCausalLM.from_pretrained(model_folder), RefragProcessor.from_pretrained(model_folder)
    check(tmp_path / "store", PassageEncoder.from_model(model.eval(), processor))
    store = ChunkStore.open(tmp_path / "store")
    assert store.fingerprint.chunker.startswith("sentence")
    assert store.fingerprint.pooling == "mean, windows of 96 tokens"
    parts = ["Read: ", *PASSAGES[:4], "So?"]
    encoded = model(prompt=processor(parts)).logits
    looked_up = model(prompt=processor([Passage(id=p.id) if isinstance(p, Passage) else p for p in parts], store=store))
    assert (looked_up.logits - encoded).norm() <= 1e-5 * encoded.norm()


def test_another_k_or_encoder_is_refused(run, corpus, tmp_path, model_folder, expected):
    assert run(corpus).exit_code == 0
    for arguments, message in [
        (["--k", "16"], "chunker: holds fixed, k = 8, got fixed, k = 16"),
        (["--preset", "lclm"], "pooling: holds first, got mean"),
        (["--encoder-dtype", "bfloat16"], "encoder: holds embeddings of"),
        (["--dtype", "float16"], "--dtype: got float16, but the store"),
    ]:
        result = run(corpus, *arguments)  # the last of a repeated option counts
        assert result.exit_code == 2 and message in result.stderr, result.output
    check(tmp_path / "store", expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "spark"], "--engine: got 'spark', needs here or ray"),
        (["--workers", "2"], "--workers: got 2, needs --engine ray"),
        (["--chunker", "words"], "--chunker: got 'words', needs one of fixed, sentence"),
        (["--preset", "big"], "--preset: got 'big', needs one of paper, lclm"),
        (["--dtype", "int8"], "--dtype: got 'int8', needs one of float32, bfloat16, float16"),
        (["--shard-passages", "0"], "--shard-passages: got 0, needs 1 or more"),
        (["--device", "nowhere"], "--device: got nowhere"),
        (["--model", "nowhere"], "--encoder: got"),
        (["nothing.jsonl"], "nothing.jsonl"),
    ],
)
def test_bad_input_gives_a_one_line_error(run, corpus, tmp_path, arguments, message):
    result = run(corpus, *arguments)
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.output, result.output
    assert not (tmp_path / "store").exists()


def test_a_folder_without_a_model_is_refused(run, corpus, tmp_path):
    result = run(corpus, "--model", tmp_path, encoder=False)
    assert result.exit_code == 2 and "has no config.json, needs a folder that" in result.stderr


def test_the_demos_encoders_are_the_defaults(run, tmp_path):
    (tmp_path / "one.txt").write_text("The bridge of Orla was built in 1871.")
    assert run(tmp_path, "--preset", "lclm", encoder=False).exit_code == 0
    fingerprint = ChunkStore.open(tmp_path / "store").fingerprint
    assert fingerprint.encoder == str(weights.encoder_folder())
    assert fingerprint.pooling == "mean, windows of 512 tokens" and fingerprint.chunker == "fixed, k = 16"
    assert run(tmp_path, "--k", "16", encoder=False).exit_code == 0  # there is no adapter for this k: the same encoder
    assert len(list((tmp_path / "store").glob("shard-*"))) == 1


def test_a_job_keeps_its_store_in_another_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = pickle.loads(pickle.dumps(EncodeJob(Path("store"))))
    monkeypatch.chdir("/")
    assert job.store == tmp_path / "store"


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    environment = {"PYTHONPATH": os.pathsep.join(["python", ".", os.environ.get("PYTHONPATH", "")])}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, os.pathsep.join(map(os.path.abspath, filter(None, value.split(os.pathsep)))))
        ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        yield ray
        ray.shutdown()


def test_on_ray(ray, run, corpus, tmp_path, expected):
    lines = corpus.read_text().split("\n")
    corpus.write_text("\n".join([*lines[:17], "no", *lines[17:]]))
    result = run(corpus, "--engine", "ray", "--workers", "1", "--shard-passages", "6")
    assert result.exit_code == 2 and f"{corpus}:18: is not JSON" in result.stderr.replace("\n", ""), result.output
    done = len(ChunkStore.open(tmp_path / "store", expected.fingerprint))
    assert done in (0, 6, 9, 12, 15)  # slices of 6, 6, 5 and 3 passages; a worker may have continued with the last one
    result = run(corpus, "--engine", "ray", "--workers", "2", "--shard-passages", "6", "--skip-bad")
    assert result.exit_code == 0, result.output
    assert (
        f"{20 - done} passages encoded, {done} skipped" in result.output
        and "corpus.jsonl:18: is not JSON" in result.output
    )
    check(tmp_path / "store", expected)
    result = run(corpus, "--engine", "ray", "--workers", "3")
    assert result.exit_code == 2 and "--workers: got 3, needs 1 to 2, the CPUs of the Ray cluster" in result.stderr


def test_without_ray_the_extra_is_named(run, corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run(corpus, "--engine", "ray")
    assert result.exit_code == 2 and "pip install 'refrag-kernels[ray]'" in result.stderr
    assert not (tmp_path / "store").exists()
