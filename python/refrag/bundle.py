"""A model with its tokenizers, loaded for training, and the initial weights of its projector."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import refrag_kernels as rk
from refrag.adapters import load_adapter
from refrag.model.encoder import pack_texts
from refrag.model.modeling import RefragForCausalLM
from refrag.model.policy import ExpansionPolicy
from refrag.model.token_encoder import token_encoder


@dataclasses.dataclass
class ModelBundle:
    """A model and its two tokenizers."""

    model: RefragForCausalLM
    tokenizer: PreTrainedTokenizerBase
    encoder_tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(
        cls,
        encoder: str | os.PathLike[str] | None,
        decoder: str | os.PathLike[str],
        k: int,
        preset: str,
        **fields: Any,
    ) -> ModelBundle:
        """Load a pretrained encoder and decoder, and join them with a projector initialized by ``start_projector``.

        With the preset "tokens", no encoder is loaded: ``token_encoder`` builds one from the decoder's embeddings.
        """
        language_model = AutoModelForCausalLM.from_pretrained(decoder)
        tokenizer = encoder_tokenizer = AutoTokenizer.from_pretrained(decoder)
        if preset == "tokens":
            if encoder is not None:
                raise ValueError(f"encoder: got {encoder}, needs None: preset tokens uses the decoder's embeddings")
            text_model = token_encoder(language_model)
        else:
            if encoder is None:
                raise ValueError(f"encoder: got None, needs a folder or name with preset {preset}")
            text_model, encoder_tokenizer = AutoModel.from_pretrained(encoder), AutoTokenizer.from_pretrained(encoder)
        model = RefragForCausalLM.from_parts(text_model, language_model, k, preset=preset, **fields)
        start_projector(model)
        return cls(model, tokenizer, encoder_tokenizer)

    @classmethod
    def load_trained(
        cls,
        adapter: str | os.PathLike[str],
        decoder: str | os.PathLike[str],
        *,
        encoder: str | os.PathLike[str] | None = None,
    ) -> tuple[ModelBundle, ExpansionPolicy | None]:
        """Load an adapter, and its policy if it has one, on the encoder and decoder that it was trained on."""
        language_model = AutoModelForCausalLM.from_pretrained(decoder)
        tokenizer = encoder_tokenizer = AutoTokenizer.from_pretrained(decoder)
        text_model = None
        if encoder is not None:
            text_model, encoder_tokenizer = AutoModel.from_pretrained(encoder), AutoTokenizer.from_pretrained(encoder)
        model, policy = load_adapter(adapter, language_model, text_model)
        return cls(model, tokenizer, encoder_tokenizer), policy

    @property
    def k(self) -> int:
        """Decoder tokens per chunk."""
        return self.model.config.chunk_size

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the chunk embeddings of texts, as selectors expect them: [N, d_enc]."""
        special = self.model.config.encoder_special_tokens
        return self.model.encode_chunks(pack_texts(self.encoder_tokenizer, texts, special_tokens=special))

    def signature(self) -> dict[str, Any]:
        """Return the model's properties that a checkpoint must match to be resumed."""
        decoder, encoder = self.model.decoder.config, self.model.encoder.config
        # Omit the default of one slot per chunk, so that checkpoints from before this option still match.
        latents = self.model.config.latents
        return {
            **({"latents": latents} if latents > 1 else {}),
            "k": self.k,
            "pooling": self.model.config.pooling,
            "decoder": [decoder.model_type, decoder.hidden_size, decoder.num_hidden_layers],
            "encoder": [encoder.model_type, encoder.hidden_size, encoder.num_hidden_layers],
        }


@torch.no_grad()
def start_projector(model: RefragForCausalLM) -> None:
    """Initialize the projector so that the decoder can read its slots.

    Slots are scaled to the root mean square of token embeddings; with torch's default initialization, they would be
    negligible compared to the text or dominate it. With pooling "concat", a random projection maps each segment of a
    chunk to its own dimensions, which preserves the order of segments.
    """
    up, down = model.projector.up, model.projector.down
    width = up.out_features
    generator = torch.Generator("cpu").manual_seed(0)
    if model.config.pooling == "concat" and width >= model.config.pool_segments:
        segments, own = model.config.pool_segments, up.in_features // model.config.pool_segments
        share = width // segments
        up.weight.mul_(0.02)
        for segment in range(segments):
            rows, columns = slice(segment * share, (segment + 1) * share), slice(segment * own, (segment + 1) * own)
            block = torch.randn(max(share, own), min(share, own), generator=generator, device="cpu")
            block = torch.linalg.qr(block)[0].to(up.weight)
            up.weight[rows, columns] += block if share >= own else block.T * (own / share) ** 0.5
        same = torch.eye(width, dtype=down.weight.dtype, device=down.weight.device)
        down.weight.mul_(0.02).add_(same.repeat(model.config.latents, 1))
    for layer in (up, down):
        if layer.bias is not None:
            layer.bias.zero_()
    table = model.get_input_embeddings().weight
    size = float(table[:: max(1, len(table) // 1000)].float().pow(2).mean().sqrt())
    chunks = torch.randn(256, up.in_features, generator=generator, device="cpu").to(table)
    slots = rk.project_chunks(
        model.projector.norm(chunks), *model.projector.weights(), activation=model.projector.activation
    )
    down.weight.mul_(size / float(slots.float().pow(2).mean().sqrt()))
