"""Measures time to first token, time per token and KV-cache bytes for several ways to read one prompt."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from refrag.model.state import key_values
from refrag.retrieval.retriever import Progress

Prefill = Callable[[], CausalLMOutputWithPast]


@dataclasses.dataclass
class Reading:
    """One way to read a prompt, and its timings.

    Attributes
    ----------
    rows : int
        Number of rows that the decoder reads.
    prefill : callable
        Reads the prompt; returns the logits of the last row and the filled cache.
    seconds : list of float
        Times to the first token, one per round.
    """

    rows: int
    prefill: Prefill
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def first_token(self) -> float:
        """Median time to the first token, in seconds."""
        return statistics.median(self.seconds)


def time_readings(
    readings: dict[str, Reading], rounds: int, track: Progress = iter
) -> dict[str, CausalLMOutputWithPast]:
    """Time every reading ``rounds`` times, interleaved, so that a busy machine affects all of them equally.

    Parameters
    ----------
    readings : dict
        Readings by name; appends to their ``seconds``.
    rounds : int
    track : callable, optional
        Wraps the individual timings to show progress.

    Returns
    -------
    dict
        The last output of each reading.
    """
    outputs: dict[str, CausalLMOutputWithPast] = {}
    with torch.inference_mode():
        for name in track([*readings] * rounds):
            outputs.pop(name, None)  # free the cache of the last round before making the next
            start = time.perf_counter()
            output = readings[name].prefill()
            output["logits"].argmax(-1)
            readings[name].seconds.append(time.perf_counter() - start)
            outputs[name] = output
    return outputs


class CpuPressure:
    """The fraction of time in which some process waited for a CPU, from Linux's pressure stall information.

    Our own threads rarely wait for a CPU, so a high value means that other programs disturbed the measurement.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter(), _stalled()

    def share(self) -> float | None:
        """Return the fraction since this object was created, 0 to 1, or None if the system doesn't report it."""
        began, stalled = self._start
        now = _stalled()
        return None if now is None or stalled is None else (now - stalled) / (time.perf_counter() - began)


def _stalled() -> float | None:
    try:
        first = Path("/proc/pressure/cpu").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    return int(first.rsplit("total=", 1)[1]) / 1e6


@dataclasses.dataclass
class Continuation:
    """The tokens that a decoder generated after a prompt, and their cost.

    Attributes
    ----------
    token_ids : list of int
        Tokens before the end-of-sequence token.
    seconds_per_token : float
        Median time of a decode step.
    kv_bytes : int
        Size of the KV cache after the prompt, before the first new token.
    """

    token_ids: list[int]
    seconds_per_token: float
    kv_bytes: int


def continue_greedily(
    decoder: PreTrainedModel,
    output: CausalLMOutputWithPast,
    end: set[int],
    max_new_tokens: int,
    *,
    first_position: int | None = None,
    min_steps: int = 8,
) -> Continuation:
    """Generate greedily after a prefilled prompt, timing each token.

    Parameters
    ----------
    decoder : PreTrainedModel
    output : CausalLMOutputWithPast
        The prompt's output; generation extends its cache.
    end : set of int
        End-of-sequence tokens.
    max_new_tokens : int
    first_position : int, optional
        Position of the first new token, if it isn't the number of rows read.
    min_steps : int
        Minimum number of decode steps to time, even if the answer is shorter.
    """
    cache = output["past_key_values"]
    kv_bytes = sum(keys.nbytes + values.nbytes for keys, values in key_values(cache))
    token = output["logits"][:, -1].argmax(-1, keepdim=True)
    position = first_position
    token_ids = [int(token)]
    steps: list[float] = []
    with torch.inference_mode():
        while len(steps) < min_steps or (len(token_ids) < max_new_tokens and not end.intersection(token_ids)):
            start = time.perf_counter()
            arguments: dict[str, Any] = {}
            if position is not None:
                arguments["position_ids"] = torch.tensor([[position]], device=token.device)
                position += 1
            step = decoder(input_ids=token, past_key_values=cache, use_cache=True, **arguments)
            token = step.logits[:, -1].argmax(-1, keepdim=True)
            token_ids.append(int(token))
            steps.append(time.perf_counter() - start)
    answer = token_ids[:max_new_tokens]
    length = next((i for i, token_id in enumerate(answer) if token_id in end), len(answer))
    return Continuation(answer[:length], statistics.median(steps), kv_bytes)
