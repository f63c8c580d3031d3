"""Two attentions for a run, and a comparison of them before it begins: refrag_kernels' own, and torch's."""

from __future__ import annotations

from typing import Any

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
    """

    def __init__(self, groups: list[tuple[int, int]], device: torch.device, *, causal: bool) -> None:
        self.groups = [group for group in groups if group[0]]
        lengths = [[rows] for count, rows in self.groups for _ in range(count)]
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
    for count, rows in refrag_plans.groups:
        end = start + count * rows
        q, k, v = (
            states[0, :, start:end].unflatten(1, (count, rows)).transpose(0, 1) for states in (query, key, value)
        )
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=refrag_plans.causal, scale=scaling, enable_gqa=True
        )
        parts.append(out.transpose(1, 2).flatten(0, 1))
        start = end
    return torch.cat(parts)[None], None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)
