"""AdamW on a few flat tensors that skips steps with NaN gradients, and learning rates that follow a run's progress."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from refrag.training.distill.options import DistillOptions


class FlatAdamW:
    """AdamW on one flat tensor per group, so that a step takes a handful of kernel launches.

    Parameters and their gradients become views of the flat tensors. A step whose gradient isn't finite leaves the
    weights unchanged. Such steps are counted on the device, so that the host doesn't wait.

    Parameters
    ----------
    groups : mapping of str to sequence of (str, Parameter)
        Parameters by group, in float32.
    max_grad_norm : float
        Limit for the norm of all gradients together.
    betas : tuple of 2 floats
        AdamW's.

    Attributes
    ----------
    skipped, in_a_row : Tensor, int64 []
        Number of steps skipped so far, and number skipped in a row up to now.
    norm : Tensor []
        Gradient norm of the last step, before clipping.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[tuple[str, nn.Parameter]]],
        max_grad_norm: float,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        self._flat: dict[str, torch.Tensor] = {}
        for group, named in groups.items():
            parameters = [parameter for _, parameter in named]
            flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
            flat.grad = torch.zeros_like(flat)
            sizes = [parameter.numel() for parameter in parameters]
            for parameter, own, grad in zip(parameters, flat.split(sizes), flat.grad.split(sizes)):
                parameter.data = own.view(parameter.shape)
                parameter.grad = grad.view(parameter.shape)
            self._flat[group] = flat
        device = next(iter(self._flat.values())).device
        self._adam = torch.optim.AdamW(
            [{"params": [flat], "name": group} for group, flat in self._flat.items()],
            lr=0.0, betas=betas, weight_decay=0.0, fused=True,
        )  # fmt: skip
        self._max_grad_norm = max_grad_norm
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self.norm = torch.zeros((), device=device)

    @torch.no_grad()
    def step(self, rates: Mapping[str, float]) -> None:
        """Take a step with each group's rate, and set the gradients to zero."""
        grads = [flat.grad for flat in self._flat.values()]
        self.norm = torch.stack([torch.linalg.vector_norm(grad) for grad in grads]).norm()  # type: ignore[arg-type]
        finite = self.norm.isfinite()
        factor = self._max_grad_norm / self.norm.clamp(min=self._max_grad_norm)
        for grad in grads:
            grad.copy_(torch.where(finite, grad * factor, 0.0))  # type: ignore[union-attr, operator]
        self.skipped += ~finite
        self.in_a_row.copy_(torch.where(finite, 0, self.in_a_row + 1))
        for group in self._adam.param_groups:
            group["lr"] = rates[group["name"]]
        self._adam.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Set the gradients to zero, in place."""
        for flat in self._flat.values():
            flat.grad.zero_()  # type: ignore[union-attr]

    def gradient(self) -> torch.Tensor:
        """Return a copy of all gradients, concatenated."""
        return torch.cat([flat.grad for flat in self._flat.values()])  # type: ignore[arg-type, misc]

    def state(self) -> dict[str, Any]:
        """Return copies on the CPU of the weights and of Adam's moments."""
        state: dict[str, Any] = {"weights": {name: flat.cpu().clone() for name, flat in self._flat.items()}}
        moments = self._adam.state_dict()["state"]
        state["moments"] = {
            number: {name: value.cpu().clone() for name, value in own.items()} for number, own in moments.items()
        }
        return state

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state`` returned."""
        for name, flat in self._flat.items():
            flat.copy_(state["weights"][name])
        groups = self._adam.state_dict()["param_groups"]
        self._adam.load_state_dict({"state": state["moments"], "param_groups": groups})


def rates_at(options: DistillOptions, progress: float) -> dict[str, float]:
    """Return each group's learning rate: linear warm-up, then a cosine; only the linear layer trains at first.

    Examples
    --------
    >>> from pathlib import Path
    >>> files = {"tokens": (Path("a"),), "heldout": (Path("b"),), "output": Path("c")}
    >>> options = DistillOptions(**files, minutes=1, linear_alone=0.1, warmup=0.05)
    >>> [round(rates_at(options, progress)["decoder"] / options.decoder_rate, 3) for progress in (0.0, 0.1, 0.15)]
    [0.0, 0.0, 1.0]
    >>> round(rates_at(options, 1.0)["linear"] / options.linear_rate, 3)
    0.1
    """
    peaks = {"linear": options.linear_rate, "encoder": options.encoder_rate, "decoder": options.decoder_rate}
    rates = {}
    for name, peak in peaks.items():
        begin = 0.0 if name == "linear" else options.linear_alone
        since = progress - begin
        if since < options.warmup:
            rates[name] = peak * max(0.0, since / options.warmup)
            continue
        falling = min(1.0, (since - options.warmup) / max(1e-9, 1 - begin - options.warmup))
        rates[name] = peak * (options.floor + (1 - options.floor) * 0.5 * (1 + math.cos(math.pi * falling)))
    return rates


@dataclasses.dataclass
class Progress:
    """A run's progress from 0 to 1, by its steps or by the clock.

    Attributes
    ----------
    steps : int or None
    seconds : float or None
        Time for all steps of the run.
    before : float
        Seconds that the run took before it was resumed; ``begin`` starts the clock for the rest.
    """

    steps: int | None
    seconds: float | None
    before: float = 0.0
    _began: float | None = None

    def begin(self) -> None:
        """Start the clock."""
        self._began = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds of training, including those before the run was resumed."""
        return self.before + (0.0 if self._began is None else time.monotonic() - self._began)

    def at(self, step: int) -> float:
        """Return the fraction of the run before step number ``step``."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        return min(1.0, self.elapsed / max(1e-9, self.seconds or 0.0))
