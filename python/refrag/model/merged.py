"""A model's weights with its low-rank adapters added to them, under the names that they have without adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def merged_state(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """Return the state dict of a model as if it had no adapters, their updates added; the model stays as it is.

    Parameters
    ----------
    model : nn.Module
        With layers that peft has put around linear ones, or without.

    Returns
    -------
    dict of str to Tensor, or None
        None if there are no such layers.

    Raises
    ------
    ValueError
        If a layer has an adapter of another kind than LoRA, which can't be added to its weight.
    """
    wrapped: dict[str, Any] = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(getattr(layer, "base_layer", None), nn.Module)
    }
    if not wrapped:
        return None
    state = model.state_dict()
    for name, layer in wrapped.items():
        own = {key: state.pop(key) for key in list(state) if key.startswith(f"{name}.")}
        base = {key.removeprefix(f"{name}.base_layer."): value for key, value in own.items() if ".base_layer." in key}
        plain = hasattr(layer, "get_delta_weight") and not any(getattr(layer, "use_dora", {}).values())
        if not plain or not isinstance(layer.base_layer, nn.Linear):
            raise ValueError(
                f"{name}: has an adapter that can't be added to its weight, a {type(layer).__name__}; remove it, or "
                "write it by the library that made it"
            )
        if not layer.merged and not layer.disable_adapters:
            weight = base["weight"]
            update = sum(layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters)
            base["weight"] = (weight.float() + update).to(weight.dtype)
        state.update({f"{name}.{key}": value for key, value in base.items()})
    return state
