"""The states of torch's random generators in every process, so that dropout resumes exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

_WITH_GENERATORS = ("cuda", "xpu")  # device types with a generator per device


def generator_states(accelerator: Accelerator) -> list[dict[str, torch.Tensor]]:
    """Gather the generator states of all processes; every process must call this."""
    own = {"cpu": torch.get_rng_state()}
    device = accelerator.device
    if device.type in _WITH_GENERATORS:
        own[device.type] = torch.get_device_module(device).get_rng_state(device)
    return gather_object([own])


def restore_generators(accelerator: Accelerator, states: Sequence[dict[str, torch.Tensor]]) -> None:
    """Restore this process's generators. A process for which no state was saved keeps its current states."""
    if accelerator.process_index >= len(states):
        return
    own = states[accelerator.process_index]
    torch.set_rng_state(own["cpu"])
    device = accelerator.device
    if device.type in _WITH_GENERATORS and device.type in own:
        torch.get_device_module(device).set_rng_state(own[device.type], device)
