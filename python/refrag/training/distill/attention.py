"""Attention for packed groups of equal-length sequences: refrag_kernels' plans, and torch's attention in batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from refrag.model.attention import AttentionPlans, refuse_unknown
from refrag_kernels import ChunkLayout, ChunkMask

GROUPED = "refrag_grouped"


class GroupedPlans(AttentionPlans):
    """Plans for sequences in groups of equal length, which torch's attention can process as batches.

    Parameters
    ----------
    groups : sequence of (int, int)
        Number of sequences in each group, and rows per sequence.
    device : torch.device
    causal : bool
    used : ndarray [sequences], optional
        Rows of each sequence before its padding; all by default. Needed only for sequences that aren't causal, since
        causal rows don't attend to the padding after them.

    Attributes
    ----------
    groups : list of (int, int)
    masks : list of (Tensor or None)
        For each group, a mask of the rows that may be attended to, [sequences, 1, 1, rows]; None means all.
    """

    def __init__(
        self, groups: list[tuple[int, int]], device: torch.device, *, causal: bool, used: np.ndarray | None = None
    ) -> None:
        rows = np.repeat([rows for _, rows in groups], [count for count, _ in groups])
        used = rows if used is None else used
        self.groups: list[tuple[int, int]] = []
        self.masks: list[torch.Tensor | None] = []
        start = 0
        for count, each in groups:
            own = used[start : (start := start + count)]
            whole = int((own == each).cumprod().sum())  # padded sequences come last, and only they need a mask
            if whole:
                self.groups.append((whole, each))
                self.masks.append(None)
            if whole < count:
                self.groups.append((count - whole, each))
                kept = torch.from_numpy(np.arange(each) < own[whole:, None])
                self.masks.append(kept[:, None, None].to(device))
        lengths = [[part] for part in np.stack([used, rows - used], 1).ravel().tolist() if part]
        super().__init__(ChunkLayout.from_lengths(lengths).to(device), ChunkMask.full(), causal=causal)


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    refrag_plans: GroupedPlans,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention with torch's scaled_dot_product_attention, one group of sequences at a time.

    Follows transformers' calling convention: query [1, H_q, T, D] -> ([1, T, H_q, D], None). ``dropout`` and
    ``is_causal`` are ignored, as with plans.

    Raises
    ------
    ValueError
        If a window is shorter than a sequence, or a keyword isn't supported, such as a softcap or sinks.
    """
    refuse_unknown(module, kwargs)
    longest = max((rows for _, rows in refrag_plans.groups), default=0)
    if sliding_window is not None and sliding_window < longest:
        raise ValueError(
            f"sliding_window: {type(module).__name__} got {sliding_window} with sequences of {longest} rows, which "
            "torch's attention doesn't support in groups"
        )
    parts, start = [], 0
    repeats = query.shape[1] // key.shape[1]
    for (count, rows), mask in zip(refrag_plans.groups, refrag_plans.masks):
        end = start + count * rows
        q, k, v = (
            states[0, :, start:end].unflatten(1, (count, rows)).transpose(0, 1) for states in (query, key, value)
        )
        if mask is not None:  # none of torch's fused kernels supports both a mask and grouped-query heads
            k, v = (states.repeat_interleave(repeats, 1) for states in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=refrag_plans.causal, scale=scaling, enable_gqa=mask is None
        )
        parts.append(out.transpose(1, 2).flatten(0, 1))
        start = end
    return torch.cat(parts)[None], None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
