"""Models whose shapes the benchmarks use, from their config.json on the Hugging Face hub."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Preset:
    """The shapes of a decoder and its encoder.

    ``hidden_size`` is the decoder's, ``encoder_hidden_size`` the encoder's.
    """

    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate: int
    layers: int
    vocabulary: int
    family: str  # of transformers: "llama" or "qwen3"
    encoder_hidden_size: int
    encoder_heads: int
    encoder_layers: int
    encoder_intermediate: int
    tied: bool = True

    def parameters(self) -> int:
        """Return the decoder's number of weights, excluding norms."""
        attention = self.hidden_size * self.head_dim * 2 * (self.heads + self.kv_heads)
        embeddings = self.vocabulary * self.hidden_size * (1 if self.tied else 2)
        return self.layers * (attention + 3 * self.hidden_size * self.intermediate) + embeddings


_MINILM = (384, 12, 6, 1536)  # all-MiniLM-L6-v2
_ROBERTA_LARGE = (1024, 16, 24, 4096)  # the paper's encoder for LLaMA-2-7B

PRESETS = {
    "smollm2-135m": Preset(9, 3, 64, 576, 1536, 30, 49152, "llama", *_MINILM),
    "llama3.2-1b": Preset(32, 8, 64, 2048, 8192, 16, 128256, "llama", *_ROBERTA_LARGE),
    "llama2-7b": Preset(32, 32, 128, 4096, 11008, 32, 32000, "llama", *_ROBERTA_LARGE, tied=False),
    "llama2-13b": Preset(40, 40, 128, 5120, 13824, 40, 32000, "llama", *_ROBERTA_LARGE, tied=False),
    "llama3-8b": Preset(32, 8, 128, 4096, 14336, 32, 128256, "llama", *_ROBERTA_LARGE, tied=False),
    "llama3-70b": Preset(64, 8, 128, 8192, 28672, 80, 128256, "llama", *_ROBERTA_LARGE, tied=False),
    "qwen3-4b": Preset(32, 8, 128, 2560, 9728, 36, 151936, "qwen3", *_ROBERTA_LARGE),
    # Shapes of a published model small enough to check whole against float64, and a tiny model for dry runs.
    "llama2-7b-2-layers": Preset(32, 32, 128, 4096, 11008, 2, 32000, "llama", 1024, 16, 2, 4096, tied=False),
    "tiny": Preset(4, 2, 16, 64, 128, 2, 32000, "llama", 32, 2, 2, 64),
}
