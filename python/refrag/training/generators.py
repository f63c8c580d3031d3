"""The states of torch's random generators, of every process: dropout goes on in each where it was."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

_WITH_GENERATORS = ("cuda", "xpu")  # devices that have one each


def generator_states(accelerator: Accelerator) -> list[dict[str, torch.Tensor]]:
    """Return the states of every process's generators; all processes have to call."""
    own = {"cpu": torch.get_rng_state()}
    device = accelerator.device
    if device.type in _WITH_GENERATORS:
        own[device.type] = torch.get_device_module(device).get_rng_state(device)
    return gather_object([own])


def restore_generators(accelerator: Accelerator, states: Sequence[dict[str, torch.Tensor]]) -> None:
    """Put this process's generators into their states; those of a process that wasn't there stay as they are."""
    if accelerator.process_index >= len(states):
        return
    own = states[accelerator.process_index]
    torch.set_rng_state(own["cpu"])
    device = accelerator.device
    if device.type in _WITH_GENERATORS and device.type in own:
        torch.get_device_module(device).set_rng_state(own[device.type], device)
