"""Merges adapters into a copy of a model's weights, under the names of the plain model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def merged_state(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """Return a model's state dict with its adapters merged into the weights; the model itself is unchanged.

    Parameters
    ----------
    model : nn.Module
        May contain peft's wrappers of linear layers, and of modules that were trained whole (``modules_to_save``).

    Returns
    -------
    dict of str to Tensor, or None
        None if the model has no such layers.

    Raises
    ------
    ValueError
        If a layer's adapter isn't LoRA and can't be merged into its weight, or changes one of two tied weights.
    """
    wrapped = _wrappers(model, "base_layer")
    copies = _wrappers(model, "original_module")
    if not wrapped and not copies:
        return None
    state = model.state_dict()
    for name, layer in wrapped.items():
        own = {key: state.pop(key) for key in list(state) if key.startswith(f"{name}.")}
        base = {key.removeprefix(f"{name}.base_layer."): value for key, value in own.items() if ".base_layer." in key}
        plain = hasattr(layer, "get_delta_weight") and not any(getattr(layer, "use_dora", {}).values())
        if not plain or not isinstance(layer.base_layer, nn.Linear):
            raise ValueError(
                f"{name}: has an adapter that can't be merged into its weight, a {type(layer).__name__}; remove it, or "
                "save it with the library that created it"
            )
        if not layer.merged and not layer.disable_adapters:
            weight = base["weight"]
            update = sum(layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters)
            base["weight"] = (weight.float() + update).to(weight.dtype)
        state.update({f"{name}.{key}": value for key, value in base.items()})
    for name, copied in copies.items():
        adapters = [] if copied.disable_adapters else list(copied.active_adapters)
        if not hasattr(copied, "modules_to_save") or len(adapters) > 1:
            raise ValueError(f"{name}: is a {type(copied).__name__} with adapters {adapters}, needs one trained copy")
        kept = f"{name}.modules_to_save.{adapters[0]}." if adapters else f"{name}.original_module."
        own = {key: state.pop(key) for key in list(state) if key.startswith(f"{name}.")}
        state.update({f"{name}.{key.removeprefix(kept)}": value for key, value in own.items() if key.startswith(kept)})
    _require_tied(model, state)
    return state


def _wrappers(model: nn.Module, attribute: str) -> dict[str, Any]:
    """Return the modules, by name, that hold the module they wrap in this attribute."""
    return {
        name: part
        for name, part in model.named_modules()
        if isinstance(vars(part)["_modules"].get(attribute), nn.Module)
    }


def _require_tied(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Refuse weights that differ but are tied by the config: loading would make them equal."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return
    tied = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [f"{name}.weight" for name, part in model.named_modules() if any(part is one for one in tied)]
    first, *others = [name for name in names if name in state]
    for name in others:
        if not torch.equal(state[first], state[name]):
            raise ValueError(f"{name}: has an adapter, but the config ties it to {first}, which has another weight")
