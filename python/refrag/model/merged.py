"""Merges low-rank adapters into a copy of a model's weights, under the names of the plain model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def merged_state(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """Return a model's state dict with its adapters merged into the weights; the model itself is unchanged.

    Parameters
    ----------
    model : nn.Module
        May contain peft's wrappers of linear layers.

    Returns
    -------
    dict of str to Tensor, or None
        None if the model has no such layers.

    Raises
    ------
    ValueError
        If a layer's adapter isn't LoRA and can't be merged into its weight.
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
                f"{name}: has an adapter that can't be merged into its weight, a {type(layer).__name__}; remove it, or "
                "save it with the library that created it"
            )
        if not layer.merged and not layer.disable_adapters:
            weight = base["weight"]
            update = sum(layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters)
            base["weight"] = (weight.float() + update).to(weight.dtype)
        state.update({f"{name}.{key}": value for key, value in base.items()})
    return state
