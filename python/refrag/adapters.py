"""Adapters: selects the trained parameters, whole or as low-rank updates, and reads and writes their file."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from refrag import deprecated
from refrag.file_modes import usual_mode
from refrag.model.config import RefragConfig
from refrag.model.modeling import RefragForCausalLM
from refrag.model.policy import ExpansionPolicy
from refrag.model.token_encoder import first_layers, token_encoder
from refrag.weights import named_adapter

_DECODER_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Attention only: the encoder's feed-forward layers run as fused kernels that read their weights directly.
_ENCODER_LAYERS = ("query", "key", "value", "q_proj", "k_proj", "v_proj", "Wqkv")
_FIELDS = ("chunk_size", "pooling", "encoder_special_tokens", "projector_norm", "projector_activation",
           "projector_bias", "position_ids", "decoder_mask", "pool_segments", "latents", "encoder_window")  # fmt: skip
_FORMAT = 1
LORA_SCALE = 2  # alpha / rank, the same for every rank


__getattr__ = deprecated.renamed(__name__)


class AdapterError(ValueError):
    """Raised if a file is not an adapter, or an adapter doesn't fit the model."""


@dataclasses.dataclass(frozen=True)
class TrainableSpec:
    """Which parts of the model to train. The projector is always trained.

    Attributes
    ----------
    train_encoder, train_decoder : {"all", "lora", "none"}
        The paper trains the whole encoder throughout, and the whole decoder after reconstruction.
    rank : int
        Rank of the low-rank adapters (LoRA, arXiv 2106.09685); their scale is ``LORA_SCALE``.
    """

    train_encoder: str = "all"
    train_decoder: str = "none"
    rank: int = 32

    # Without annotations, so these are not fields.
    encoder = deprecated.renamed_attribute("encoder", "train_encoder")
    decoder = deprecated.renamed_attribute("decoder", "train_decoder")

    def __post_init__(self) -> None:
        for name in ("train_encoder", "train_decoder"):
            if getattr(self, name) not in ("all", "lora", "none"):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, needs all, lora or none")
        if self.rank < 1:
            raise ValueError(f"rank: got {self.rank}, needs 1 or more")


for _part in ("encoder", "decoder"):
    TrainableSpec.__init__ = deprecated.renamed_keyword(_part, f"train_{_part}")(  # type: ignore[method-assign]
        TrainableSpec.__init__
    )


class Trainable(Protocol):
    """A TrainableSpec, or options with its fields, such as those of a training stage."""

    @property
    def train_encoder(self) -> str: ...

    @property
    def train_decoder(self) -> str: ...

    @property
    def rank(self) -> int: ...


def prepare(model: RefragForCausalLM, trained: Trainable) -> RefragForCausalLM:
    """Set ``requires_grad`` as specified, and add low-rank adapters; trained weights become float32.

    Parameters
    ----------
    model : RefragForCausalLM
    trained : TrainableSpec or options of a training stage

    Returns
    -------
    RefragForCausalLM
        The model that was passed.
    """
    model.requires_grad_(False)
    for name, layers in (("encoder", _ENCODER_LAYERS), ("decoder", _DECODER_LAYERS)):
        how, part = getattr(trained, f"train_{name}"), getattr(model, name)
        if how == "all":
            part.requires_grad_(True)
        elif how == "lora":
            _inject_lora(part, layers, trained.rank)
    model.projector.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if "pooler" in name.split("."):
            parameter.requires_grad_(False)  # it is never used, but DDP would wait for its gradient
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the trained tensors by name. Sharded parameters are gathered, so all processes must call this."""
    own = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in own.items()}


def save_adapter(
    model: RefragForCausalLM,
    folder: str | os.PathLike[str],
    trained: Mapping[str, torch.Tensor] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write the trained tensors in bfloat16, and a description of the model that they belong to.

    Parameters
    ----------
    model : RefragForCausalLM
        A model that ``prepare`` returned.
    folder : path
        Created if it doesn't exist.
    trained : mapping of str to Tensor, optional
        The result of ``trained_state``, which is called by default.
    notes : mapping, optional
        More metadata, as JSON values.

    Returns
    -------
    Path
        The file, ``adapter.safetensors``.
    """
    about = {
        **(notes or {}),
        "format": _FORMAT,
        "fields": {field: getattr(model.config, field) for field in _FIELDS},
        "encoder": signature(model.encoder),
        "decoder": signature(model.decoder),
        # Empty for an encoder built from the decoder's embeddings.
        "sources": {"encoder": _source(model.encoder), "decoder": _source(model.decoder)},
        # More than 0 for an encoder built from the decoder's first layers.
        "decoder_layers": getattr(model.encoder.config, "decoder_layers", 0),
    }
    return _write(folder, trained_state(model) if trained is None else trained, about)


def add_policy(source: str | os.PathLike[str], policy: ExpansionPolicy, folder: str | os.PathLike[str]) -> Path:
    """Copy an adapter and add a policy, or replace its policy.

    Parameters
    ----------
    source, folder : path
        The adapter to copy, and the folder of the new one; they may be the same.
    policy : ExpansionPolicy
    """
    about, tensors = read_adapter(source)
    kept = {name: value for name, value in tensors.items() if not name.startswith("policy.")}
    added = {f"policy.{name}": value for name, value in policy.state_dict().items()}
    return _write(folder, {**kept, **added}, {**about, "policy": policy.settings()})


def adapter_path(source: str | os.PathLike[str]) -> Path | None:
    """Return an adapter's file, given the file, its folder, or a name such as "distilled"; None if there is none.

    A file or folder of that name in the current folder takes precedence.
    """
    path = Path(source)
    if not path.exists():
        return named_adapter(str(source))
    file = path / "adapter.safetensors" if path.is_dir() else path
    return file if file.is_file() and file.suffix == ".safetensors" else None


def read_adapter(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return an adapter's metadata and its tensors.

    Parameters
    ----------
    path : path
        A file, folder or name, as in ``adapter_path``.

    Raises
    ------
    AdapterError
        If the file is not an adapter.
    """
    path = Path(path)
    path = adapter_path(path) or (path / "adapter.safetensors" if path.is_dir() else path)
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("refrag", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"adapter {path}: can't be read ({error})") from None
    if about.get("format") != _FORMAT:
        raise AdapterError(f"adapter {path}: got format {about.get('format')}, needs {_FORMAT}")
    return about, tensors


def load_adapter(
    path: str | os.PathLike[str], decoder: PreTrainedModel, encoder: PreTrainedModel | None = None
) -> tuple[RefragForCausalLM, ExpansionPolicy | None]:
    """Build the model of an adapter.

    Low-rank updates are merged into the weights of ``encoder`` and ``decoder``, so they add no cost at inference.

    Parameters
    ----------
    path : path
        The folder that a training stage wrote, the file in it, or the name of a bundled adapter, "distilled".
    decoder, encoder : PreTrainedModel
        The models that it was trained on. Without an encoder, one is built from the decoder, as for training.

    Returns
    -------
    model : RefragForCausalLM
    policy : ExpansionPolicy or None

    Raises
    ------
    AdapterError
        If the file is not an adapter, or was trained on other models.
    """
    about, tensors = read_adapter(path)
    if encoder is None:
        layers = about.get("decoder_layers", 0)
        encoder = first_layers(decoder, layers) if layers else token_encoder(decoder)
    for name, part in (("encoder", encoder), ("decoder", decoder)):
        if about[name] != signature(part):
            raise AdapterError(f"adapter {path}: was trained on {name} {about[name]}, got {signature(part)}")
    fields = dict(about["fields"])
    model = RefragForCausalLM.from_parts(encoder, decoder, fields.pop("chunk_size"), **fields)
    policy = _policy(about, tensors)
    merge_state(model, {name: value for name, value in tensors.items() if not name.startswith("policy.")})
    return model, policy


def load_policy(path: str | os.PathLike[str]) -> ExpansionPolicy:
    """Return an adapter's policy, without its model.

    Raises
    ------
    AdapterError
        If the file is not an adapter, or contains no policy.
    """
    policy = _policy(*read_adapter(path))
    if policy is None:
        raise AdapterError(f"adapter {path}: contains no policy")
    return policy


@torch.no_grad()
def merge_state(model: RefragForCausalLM, tensors: Mapping[str, torch.Tensor]) -> None:
    """Merge trained tensors into a model without adapters: add low-rank updates, replace all other weights.

    Raises
    ------
    AdapterError
        If the model lacks a weight, or its weight has another shape.
    """
    weights = dict(model.named_parameters())
    for name, value in tensors.items():
        target, is_update = name, ".lora_A." in name
        if ".lora_B." in name:
            continue
        if is_update:
            target = name[: name.index(".lora_A.")] + ".weight"
            value = LORA_SCALE * tensors[name.replace(".lora_A.", ".lora_B.")].float() @ value.float()
        target = target.replace(".base_layer.", ".")
        if target not in weights or weights[target].shape != value.shape:
            got = "none" if target not in weights else list(weights[target].shape)
            raise AdapterError(f"adapter: {target} has shape {list(value.shape)}, but the model's weight has {got}")
        held = weights[target]
        held.copy_((held.float() + value if is_update else value).to(held.dtype))


def _policy(about: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> ExpansionPolicy | None:
    if "policy" not in about:
        return None
    policy = ExpansionPolicy(**about["policy"]).eval()
    own = {name.removeprefix("policy."): value for name, value in tensors.items() if name.startswith("policy.")}
    policy.load_state_dict(own)
    return policy


def _write(folder: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], about: dict[str, Any]) -> Path:
    path = Path(folder) / "adapter.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    halved = {name: value.to(torch.bfloat16).contiguous() for name, value in tensors.items()}
    save_file(halved, part, metadata={"refrag": json.dumps(about)})
    os.chmod(part, usual_mode(path.parent))
    os.replace(part, path)
    return path


def _source(part: PreTrainedModel) -> str:
    name = part.name_or_path or ""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def _inject_lora(part: PreTrainedModel, layers: tuple[str, ...], rank: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    present = {name.rsplit(".", 1)[-1] for name, module in part.named_modules() if isinstance(module, nn.Linear)}
    targets = [layer for layer in layers if layer in present]
    if not targets:
        raise AdapterError(f"{type(part).__name__}: has none of the layers {', '.join(layers)} to adapt")
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=LORA_SCALE * rank, target_modules=targets), part)


def signature(part: PreTrainedModel) -> str:
    """Return a string that distinguishes models: the model type and sizes."""
    config: RefragConfig | object = part.config
    sizes = [getattr(config, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size")]
    return f"{getattr(config, 'model_type', '?')} " + " ".join(map(str, sizes))
