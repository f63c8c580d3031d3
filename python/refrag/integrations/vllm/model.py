"""The model in vLLM's worker: transformers' encoder, the projector, and vLLM's own decoder."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

import refrag_kernels as rk
from refrag.integrations.prompt_embeds import require_plain_decoder
from refrag.integrations.vllm.folder_encoder import POOLER, empty_encoder
from refrag.integrations.vllm.passages import MARK, MODALITY
from refrag.integrations.vllm.processing import ENCODER_ROWS, DummyPassages, PassageInfo, PassageProcessor
from refrag.model.encoder import encode_packed
from refrag.model.inputs import PackedTexts
from refrag.model.projector import ChunkProjector
from refrag_kernels import ChunkLayout


@MULTIMODAL_REGISTRY.register_processor(PassageProcessor, info=PassageInfo, dummy_inputs=DummyPassages)
class RefragForVllm(nn.Module, SupportsMultiModal):
    """RefragForCausalLM in vLLM, with the same weight names as ``save_pretrained`` writes."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return MARK if modality == MODALITY else None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        require_plain_decoder(config)
        self.config = config
        with SupportsMultiModal._mark_tower_model(self, vllm_config, MODALITY):
            self.encoder = empty_encoder(config)
            self.projector = ChunkProjector(config)
        text = config.text_config
        with SupportsMultiModal._mark_language_model(self, vllm_config):
            self.decoder = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=text,
                prefix=maybe_prefix(prefix, "decoder"),
                architectures=text.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]],
            )

    def embed_multimodal(
        self,
        encoder_ids: Sequence[torch.Tensor] | None = None,
        encoder_lengths: Sequence[torch.Tensor] | None = None,
        encoder_windows: Sequence[torch.Tensor] | None = None,
        encoder_slots: Sequence[torch.Tensor] | None = None,
        embeds: Sequence[torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> Sequence[torch.Tensor]:
        """Return each passage's slots as rows of the decoder's input, [n * latents, d_dec].

        Parameters
        ----------
        encoder_ids, encoder_lengths, encoder_windows, encoder_slots, embeds : sequences of Tensor
            One tensor per passage, as in ``ReadPassage``.
        """
        if (
            encoder_ids is None or encoder_lengths is None or encoder_windows is None
            or encoder_slots is None or embeds is None
        ):  # fmt: skip
            return []
        rows = [own.to(self.projector.up.weight) for own in embeds]
        to_encode = [index for index, ids in enumerate(encoder_ids) if len(ids)]
        if to_encode:
            windows, next_window = [], 0
            for index in to_encode:
                windows += [next_window + window for window in encoder_windows[index].tolist()]
                next_window = windows[-1] + 1
            encoded = self._encode(
                torch.cat([encoder_ids[index] for index in to_encode]),
                [length for index in to_encode for length in encoder_lengths[index].tolist()],
                windows,
            ).split([len(encoder_lengths[index]) for index in to_encode])
            for index, own in zip(to_encode, encoded):
                rows[index] = own[encoder_slots[index].bool()].to(rows[index])
        projected = rk.project_chunks(
            self.projector.norm(torch.cat(rows)), *self.projector.weights(), activation=self.projector.activation
        )
        latents = self.config.latents
        return projected.view(-1, projected.shape[1] // latents).split([latents * len(own) for own in rows])

    def _encode(self, token_ids: torch.Tensor, lengths: list[int], windows: list[int]) -> torch.Tensor:
        """Encode chunks to [N, d_enc], whole windows at a time, in passes of at most ``ENCODER_ROWS`` tokens."""
        results = []
        chunk = token = 0
        while chunk < len(lengths):
            first, start = chunk, token
            while chunk < len(lengths):
                end = bisect.bisect_right(windows, windows[chunk], chunk)
                own = sum(lengths[chunk:end])
                if chunk > first and token - start + own > ENCODER_ROWS:
                    break
                chunk, token = end, token + own
            texts = PackedTexts(
                token_ids[start:token],
                ChunkLayout.from_lengths([lengths[first:chunk]]).to(token_ids.device),
                torch.tensor(windows[first:chunk], dtype=torch.int32, device=token_ids.device)
                if self.config.encoder_window
                else None,
            )
            results.append(encode_packed(self.encoder, texts, self.config.pooling, self.config.pool_segments))
        return torch.cat(results)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        return self.decoder(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.decoder.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(
            (name, tensor) for name, tensor in weights if not name.startswith(f"encoder.{POOLER}.")
        )
