"""The projector, which maps the encoder's chunk embeddings to the decoder's input space."""

from __future__ import annotations

import torch
from torch import nn

from refrag.model.config import RefragConfig


class ChunkProjector(nn.Module):
    """The weights of phi, a two-layer MLP whose inner dimension is the decoder's hidden_size (REFRAG, B.2).

    The second layer outputs ``latents`` embeddings per chunk, concatenated. The module has no forward method:
    ``embed_mixed`` applies both layers while it writes the mixed sequence.
    """

    def __init__(self, config: RefragConfig) -> None:
        super().__init__()
        inputs, hidden_size = config.chunk_width, config.get_text_config().hidden_size
        self.activation = config.projector_activation
        self.norm = _norm(config.projector_norm, inputs)
        self.up = nn.Linear(inputs, hidden_size, bias=config.projector_bias)
        self.down = nn.Linear(hidden_size, config.latents * hidden_size, bias=config.projector_bias)

    def weights(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        """Return w1, b1, w2 and b2 for ``embed_mixed``."""
        return self.up.weight, self.up.bias, self.down.weight, self.down.bias


def _norm(kind: str, size: int) -> nn.Module:
    if kind == "rms":
        return nn.RMSNorm(size, eps=1e-6)
    return nn.LayerNorm(size) if kind == "layer" else nn.Identity()
