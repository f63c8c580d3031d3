"""Two attentions for a run, and a comparison of them before it begins: refrag_kernels' own, and torch's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from refrag.model.attention import AttentionPlans
from refrag_kernels import ChunkLayout, ChunkMask

GROUPED = "refrag_grouped"


class GroupedPlans(AttentionPlans):
    """The plans of sequences that come in groups of one length, which torch's attention can take as batches.

    Parameters
    ----------
    groups : sequence of (int, int)
        Sequences of a group, and rows of each.
    device : torch.device
    causal : bool
    used : ndarray [sequences], optional
        Rows of each sequence that are no padding, which stands behind them; without it all are. Only where sequences
        aren't causal: causal rows don't attend to what follows.

    Attributes
    ----------
    groups : list of (int, int)
    masks : list of (Tensor or None)
        For each group, which rows of each sequence may be attended to, [sequences, 1, 1, rows]; None stands for all.
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
            whole = int((own == each).cumprod().sum())  # those with padding come last: they cost a mask
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
    refrag_plans: GroupedPlans,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention by torch's scaled_dot_product_attention, a group of sequences at a time.

    In transformers' calling convention: query [1, H_q, T, D] -> ([1, T, H_q, D], None).
    """
    parts, start = [], 0
    repeats = query.shape[1] // key.shape[1]
    for (count, rows), mask in zip(refrag_plans.groups, refrag_plans.masks):
        end = start + count * rows
        q, k, v = (
            states[0, :, start:end].unflatten(1, (count, rows)).transpose(0, 1) for states in (query, key, value)
        )
        if mask is not None:  # with one, no fused kernel of torch's takes grouped heads
            k, v = (states.repeat_interleave(repeats, 1) for states in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=refrag_plans.causal, scale=scaling, enable_gqa=mask is None
        )
        parts.append(out.transpose(1, 2).flatten(0, 1))
        start = end
    return torch.cat(parts)[None], None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
