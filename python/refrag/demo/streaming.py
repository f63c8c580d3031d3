"""Text on standard output as it is generated."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer


class TimedStreamer(TextStreamer):
    """transformers' TextStreamer, without special tokens, that notes when each token came.

    Attributes
    ----------
    times : list of float
        ``time.perf_counter()`` at each new token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **options: Any) -> None:
        # generate() hands over the prompt's ids first: none, since the prompt goes in as embeddings.
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, **options)
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if value.numel():
            self.times.append(time.perf_counter())
        super().put(value)
