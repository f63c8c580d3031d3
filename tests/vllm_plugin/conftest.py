"""A saved model for vLLM to serve: SmolLM2 and MiniLM in float32. `make test-vllm` runs this folder.

Without vLLM, nothing is collected here.
"""

import importlib.util
import os

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

# Set before vLLM is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # for vLLM within the tests' own process


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """Disable the poisoning of tests/conftest.py, since vLLM reads unwritten rows of its buffers and discards them."""


@pytest.fixture(scope="session")
def model():
    """The model as ``refrag`` runs it."""
    from refrag.loading import load_model

    return load_model(None, 16)


@pytest.fixture(scope="session")
def processor():
    from refrag.loading import load_processor

    return load_processor(None, 16)


@pytest.fixture(scope="session")
def folder(model, processor, tmp_path_factory):
    """The folder that vLLM serves."""
    folder = tmp_path_factory.mktemp("served") / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
