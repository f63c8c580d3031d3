"""Rows of a packed prompt that training and evaluation need: the targets of a loss, and those whose logits to keep."""

from __future__ import annotations

import torch

from refrag.model.inputs import MixedPrompt


def next_tokens(prompt: MixedPrompt, labels: torch.Tensor, logits_to_keep: int) -> torch.Tensor:
    """Return the target of each row, int64 [1, T]: the next row's label, or -100 for none."""
    rows = prompt.layout.total_rows
    if logits_to_keep:
        raise ValueError(f"logits_to_keep: got {logits_to_keep} with labels, needs 0: the loss needs all rows")
    if labels.dtype != torch.int64 or tuple(labels.shape) not in ((rows,), (1, rows)):
        raise ValueError(f"labels: got {labels.dtype} {list(labels.shape)}, needs int64 [{rows}], one for each row")
    targets = labels.to(prompt.device).reshape(rows).masked_fill(prompt.slot_of_row >= 0, -100)
    # The row after a sequence's last row belongs to another sequence.
    targets = torch.nn.functional.pad(targets[1:], (0, 1), value=-100)
    ends = prompt.layout.sequence_offsets[1:].long() - 1
    return targets.index_fill(0, ends[ends >= 0], -100)[None]


def kept_rows(prompt: MixedPrompt, count: int) -> int | torch.Tensor:
    """Return transformers' ``logits_to_keep`` for the last ``count`` rows of each sequence."""
    if count == 0:
        return 0
    shortest = min(sum(lengths) for lengths in prompt.layout.lengths())
    if not 0 < count <= shortest:
        raise ValueError(f"logits_to_keep: got {count}, needs 0 to {shortest}, the rows of the shortest sequence")
    ends = prompt.layout.sequence_offsets[1:].long()
    return (ends[:, None] + torch.arange(-count, 0, device=ends.device)).flatten()
