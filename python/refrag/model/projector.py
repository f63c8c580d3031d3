"""The projector: from the encoder's chunk embeddings to the decoder's input space."""

from __future__ import annotations

import torch
from torch import nn

from refrag.model.config import RefragConfig


class ChunkProjector(nn.Module):
    """The weights of phi, a two-layer MLP whose hidden size is the decoder's width (REFRAG, B.2).

    Its second layer makes ``latents`` embeddings of a chunk, one after another. It has no forward of its own:
    ``embed_mixed`` applies the two layers while it writes the mixed sequence.
    """

    def __init__(self, config: RefragConfig) -> None:
        super().__init__()
        encoder_width, decoder_width = config.chunk_width, config.get_text_config().hidden_size
        self.activation = config.projector_activation
        self.norm = _norm(config.projector_norm, encoder_width)
        self.up = nn.Linear(encoder_width, decoder_width, bias=config.projector_bias)
        self.down = nn.Linear(decoder_width, config.latents * decoder_width, bias=config.projector_bias)

    def weights(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        """Return w1, b1, w2, b2 as ``embed_mixed`` takes them."""
        return self.up.weight, self.up.bias, self.down.weight, self.down.bias


def _norm(kind: str, width: int) -> nn.Module:
    if kind == "rms":
        return nn.RMSNorm(width, eps=1e-6)
    return nn.LayerNorm(width) if kind == "layer" else nn.Identity()
