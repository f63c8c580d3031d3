"""The chunk encoder of a saved model without its decoder, for selectors that embed texts."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModel, PreTrainedModel

from refrag.model import attention
from refrag.model.config import RefragConfig
from refrag.model.encoder import encode_packed
from refrag.model.feed_forward import fuse_feed_forward
from refrag.model.inputs import PackedTexts

_PREFIX = "encoder."
POOLER = "pooler"  # BERT's layer over the first row, which is unused here; some folders lack its weights


def empty_encoder(config: RefragConfig) -> PreTrainedModel:
    """Return the model's encoder with random weights, attention "refrag" and no pooler."""
    encoder = AutoModel.from_config(config.encoder_config, attn_implementation=attention.NAME).eval()
    if hasattr(encoder, POOLER):
        encoder.pooler = None
    fuse_feed_forward(encoder)
    return encoder


class FolderEncoder:
    """The encoder of a saved model, used by ``TextEmbedder`` in place of the whole RefragForCausalLM.

    Parameters
    ----------
    folder : path
        Folder that ``RefragForCausalLM.save_pretrained`` wrote.

    Raises
    ------
    ValueError
        If the folder has no encoder weights.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.config = RefragConfig.from_pretrained(folder)
        weights: dict[str, torch.Tensor] = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                own = [name for name in tensors.keys() if name.startswith(_PREFIX)]
                weights |= {name.removeprefix(_PREFIX): tensors.get_tensor(name) for name in own}
        if not weights:
            raise ValueError(f"model: {folder} has no encoder in safetensors files, needs one to compare texts")
        dtype = next(iter(weights.values())).dtype
        self.encoder = empty_encoder(self.config).to(dtype=dtype)  # type: ignore[call-arg]  # as in token_encoder
        self.encoder.load_state_dict(
            {name: tensor for name, tensor in weights.items() if not name.startswith(f"{POOLER}.")}
        )

    def encode_chunks(self, texts: PackedTexts) -> torch.Tensor:
        """Return the chunk embeddings [N, d_enc]."""
        return encode_packed(self.encoder, texts, self.config.pooling, self.config.pool_segments)
