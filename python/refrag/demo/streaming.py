"""Streaming of generated text to standard output."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer


class TimedStreamer(TextStreamer):
    """transformers' TextStreamer, which also records the time of each token and skips special tokens.

    Attributes
    ----------
    times : list of float
        ``time.perf_counter()`` at each new token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **options: Any) -> None:
        # generate() passes the prompt's ids first; there are none, since the prompt consists of embeddings.
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, **options)
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if value.numel():
            self.times.append(time.perf_counter())
        super().put(value)
