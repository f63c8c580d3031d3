"""Runs the encoder on packed texts: in one pass with plans, or as a padded batch."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from refrag.model.attention import AttentionPlans, packed_pass
from refrag.model.inputs import PackedTexts
from refrag_kernels import ChunkMask


def packed_rows(encoder: PreTrainedModel, texts: PackedTexts, *, causal: bool) -> torch.Tensor:
    """Run the encoder on packed texts in one pass with plans and return its rows [T, d]."""
    mask = ChunkMask.diagonal() if texts.windows is None else ChunkMask.passages(texts.windows)
    output = packed_pass(
        encoder,
        AttentionPlans(texts.layout, mask, causal=causal),
        input_ids=texts.token_ids[None],
        position_ids=_positions(texts, first_position(encoder))[None],
    )
    rows: torch.Tensor = output.last_hidden_state[0]
    return rows


def padded_rows(encoder: PreTrainedModel, texts: PackedTexts) -> torch.Tensor:
    """Run the encoder on a padded batch, one sequence per text or window, and return the unpadded rows [T, d]."""
    lengths = texts.layout.chunk_offsets.diff().long()
    if texts.windows is not None:
        lengths = torch.zeros_like(lengths).index_add_(0, window_of_text(texts), lengths)
        lengths = lengths[lengths > 0]
    kept = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
    padding = getattr(encoder.config.get_text_config(), "pad_token_id", None)
    ids = torch.full(kept.shape, 0 if padding is None else padding, device=lengths.device)
    ids[kept] = texts.token_ids
    rows: torch.Tensor = encoder(input_ids=ids, attention_mask=kept.long(), return_dict=True).last_hidden_state[kept]
    return rows


def window_of_text(texts: PackedTexts) -> torch.Tensor:
    """Return the number of each text's window, int64 [N], from 0."""
    windows = texts.windows
    assert windows is not None  # callers check it
    begins = torch.ones_like(windows, dtype=torch.bool)
    begins[1:] = windows[1:] != windows[:-1]
    return begins.cumsum(0) - 1


def _positions(texts: PackedTexts, first: int) -> torch.Tensor:
    """Return position ids that restart at ``first`` in every text, or in every window."""
    layout = texts.layout
    starts = layout.chunk_offsets[:-1].long()
    lengths = layout.chunk_offsets.diff().long()
    if texts.windows is not None:
        window = window_of_text(texts)
        starts = starts[torch.searchsorted(window, window)]  # of the window's first text
    rows = torch.arange(layout.total_rows, device=layout.device)
    return rows - starts.repeat_interleave(lengths, output_size=layout.total_rows) + first


def first_position(encoder: PreTrainedModel) -> int:
    """Return the position id of a text's first token, which follows the padding row in RoBERTa's position table."""
    padding = getattr(position_table(encoder), "padding_idx", None)
    return 0 if padding is None else padding + 1


def position_table(encoder: PreTrainedModel) -> nn.Embedding | None:
    """Return an encoder's learned position embeddings; None if it has none."""
    table = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    return table if isinstance(table, nn.Embedding) else None
