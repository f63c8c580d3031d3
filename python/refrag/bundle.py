"""What is trained: a model and its tokenizers, loaded and joined by a projector that slots can be read through."""

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
    """A model and the tokenizers that go with it."""

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
        """Load pretrained parts and join them by a new projector, started by ``start_projector``.

        With the preset "tokens" there is no encoder to load: it is made by ``token_encoder``.
        """
        language_model = AutoModelForCausalLM.from_pretrained(decoder)
        tokenizer = encoder_tokenizer = AutoTokenizer.from_pretrained(decoder)
        if preset == "tokens":
            if encoder is not None:
                raise ValueError(f"encoder: got {encoder}, needs None: preset tokens reads by the decoder's embeddings")
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
        """Load the model of an adapter, with the encoder and decoder that it was trained on, and its policy."""
        language_model = AutoModelForCausalLM.from_pretrained(decoder)
        tokenizer = encoder_tokenizer = AutoTokenizer.from_pretrained(decoder)
        text_model = None
        if encoder is not None:
            text_model, encoder_tokenizer = AutoModel.from_pretrained(encoder), AutoTokenizer.from_pretrained(encoder)
        model, policy = load_adapter(adapter, language_model, text_model)
        return cls(model, tokenizer, encoder_tokenizer), policy

    @property
    def k(self) -> int:
        """Decoder tokens of a chunk."""
        return self.model.config.chunk_size

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the chunk embeddings of texts, as selectors want them: [N, d_enc]."""
        special = self.model.config.encoder_special_tokens
        return self.model.encode_chunks(pack_texts(self.encoder_tokenizer, texts, special_tokens=special))

    def signature(self) -> dict[str, Any]:
        """Say what a checkpoint of these parts belongs to."""
        decoder, encoder = self.model.decoder.config, self.model.encoder.config
        # Not where a chunk has one slot: checkpoints of before there were others stay valid.
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
    """Start the projector where slots can be read.

    Slots get the size of token embeddings: torch's own start would drown them or let them drown all else. With pooling
    "concat" each run of a chunk gets dimensions of its own, by a random projection, so that their order is not mixed.
    """
    up, down = model.projector.up, model.projector.down
    width = up.out_features
    generator = torch.Generator().manual_seed(0)
    if model.config.pooling == "concat" and width >= model.config.pool_segments:
        segments, own = model.config.pool_segments, up.in_features // model.config.pool_segments
        share = width // segments
        up.weight.mul_(0.02)
        for segment in range(segments):
            rows, columns = slice(segment * share, (segment + 1) * share), slice(segment * own, (segment + 1) * own)
            block = torch.randn(max(share, own), min(share, own), generator=generator)
            block = torch.linalg.qr(block)[0].to(up.weight)
            up.weight[rows, columns] += block if share >= own else block.T * (own / share) ** 0.5
        same = torch.eye(width, dtype=down.weight.dtype)
        down.weight.mul_(0.02).add_(same.repeat(model.config.latents, 1))
    for layer in (up, down):
        if layer.bias is not None:
            layer.bias.zero_()
    table = model.get_input_embeddings().weight
    size = float(table[:: max(1, len(table) // 1000)].float().pow(2).mean().sqrt())
    chunks = torch.randn(256, up.in_features, generator=generator).to(table)
    slots = rk.project_chunks(
        model.projector.norm(chunks), *model.projector.weights(), activation=model.projector.activation
    )
    down.weight.mul_(size / float(slots.float().pow(2).mean().sqrt()))
