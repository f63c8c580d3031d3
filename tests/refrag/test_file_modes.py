"""All files have the modes given by the user's umask."""

import os
import stat

import numpy as np
import pytest
import torch
from refrag import ChunkStore
from refrag.adapters import TrainableSpec, add_policy, prepare, save_adapter
from refrag.cache import build_once
from refrag.corpus.build import whole_folder
from refrag.corpus.questions import write_questions
from refrag.model.policy import ExpansionPolicy
from refrag.training.token_files import TokenSet, write_tokens
from safetensors.torch import save_file

from tests.refrag import store_writer, training_parts
from tests.refrag.train_once import train


@pytest.fixture(params=[0o022, 0o002, 0o027, 0o077], ids=oct)
def mask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def check(folder, mask):
    """Check that every file and folder has the mode that open and mkdir give it."""
    paths = [folder, *folder.rglob("*")]
    assert len(paths) > 1
    for path in paths:
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert oct(stat.S_IMODE(path.stat().st_mode)) == oct(wanted), path


def test_a_store(tmp_path, mask):
    store = ChunkStore.create(tmp_path / "store", store_writer.FINGERPRINT)
    store_writer.put(store, [1, 2])
    # Files left by a killed writer are overwritten.
    left_over = store.folder / ".part-shard-00000001.safetensors"
    left_over.touch()
    left_over.chmod(0o600)
    store_writer.put(store, [3])
    check(store.folder, mask)


def test_a_cache(tmp_path, monkeypatch, mask):
    monkeypatch.setenv("REFRAG_CACHE", str(tmp_path / "cache"))

    def build(folder):
        (folder / "deep").mkdir()
        save_file({"a": torch.zeros(2)}, folder / "deep" / "a.safetensors")
        (folder / "b.txt").write_text("b")

    build_once("entry", build)
    check(tmp_path / "cache", mask)


def test_a_corpus(tmp_path, mask):
    with whole_folder(tmp_path / "corpus") as part:
        (part / "train.jsonl").write_text("{}\n")
    write_questions(tmp_path / "questions" / "train.jsonl", [])
    tokens = TokenSet(np.zeros(3, np.uint16), np.array([3], np.uint32), ["a"], "train", "hash")
    write_tokens(tmp_path / "tokens" / "train.tok", tokens)
    for name in ("corpus", "questions", "tokens"):
        check(tmp_path / name, mask)


def test_an_adapter(tmp_path, mask, tokenizer, encoder_tokenizer):
    model = training_parts.parts(tokenizer, encoder_tokenizer).model
    save_adapter(prepare(model, TrainableSpec(train_encoder="none")), tmp_path / "adapter")
    add_policy(tmp_path / "adapter", ExpansionPolicy(32, width=8, num_heads=2), tmp_path / "policy")
    for name in ("adapter", "policy"):
        check(tmp_path / name, mask)


@pytest.mark.parametrize("mask", [0o027], indirect=True, ids=oct)
def test_a_training_stage(tmp_path, mask):
    with torch.enable_grad():
        train(tmp_path / "stage", steps=1)
    check(tmp_path / "stage", mask)
