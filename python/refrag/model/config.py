"""RefragConfig: an encoder, a decoder, and the choices between them."""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

_CHOICES = {
    "pooling": ("first", "mean", "last", "concat"),
    "projector_norm": ("none", "rms", "layer"),
    "projector_activation": ("gelu", "gelu_tanh", "silu", "relu", "tanh", "none"),
    "position_ids": ("contiguous", "original", "parallel"),
    "decoder_mask": ("full", "passages"),
}

# Families whose tables of positions hold rows for padding, and count on from there.
_PADDED_POSITIONS = ("roberta", "camembert", "mpnet", "xmod", "data2vec-text", "longformer", "luke", "ibert")

# What the paper leaves open, each set chosen as a whole. "paper": REFRAG, section 2 and B.2, with the first token
# ([CLS]) as a chunk's embedding. "lclm": arXiv 2606.09659, windows of 1,024 tokens read together, the mean of a
# chunk's own tokens, and a norm before the MLP. "tokens": ours, for token_encoder: the chunk's tokens in their
# order and a projector without an activation, which learns from far less text.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "pooling": "first",
        "encoder_special_tokens": True,
        "projector_norm": "none",
        "projector_activation": "gelu",
    },
    "lclm": {
        "pooling": "mean",
        "encoder_special_tokens": False,
        "encoder_window": 1024,
        "projector_norm": "rms",
        "projector_activation": "gelu",
    },
    "tokens": {
        "pooling": "concat",
        "encoder_special_tokens": False,
        "projector_norm": "none",
        "projector_activation": "none",
    },
}


class RefragConfig(PreTrainedConfig):
    """Configuration of a RefragForCausalLM.

    The configs of the encoder and the decoder are copied: transformers resets the attention of a config that is handed
    to a composite one, and a live model that shares it would silently stop being causal.

    Parameters
    ----------
    text_config, encoder_config : PreTrainedConfig or dict
        The decoder's and the encoder's configuration.
    chunk_size : int
        k, the decoder tokens of a chunk.
    pooling : {"first", "mean", "last", "concat"}
        How a chunk's embedding is made from the encoder's rows. The paper doesn't say. "concat" cuts the rows into
        ``pool_segments`` runs and puts their means one after another, so that their order is kept.
    pool_segments : int
        Of "concat".
    encoder_special_tokens : bool
        Whether the encoder reads each chunk between its special tokens ([CLS] and [SEP]); pooling "first" needs them.
        Without them, an encoder that is trained along reads 2 rows less per chunk: at k = 16 a ninth of its work.
    encoder_window : int
        Encoder tokens that are read together: chunks of a passage that stand side by side see each other in the
        encoder, as many of them as fit into so many tokens, or into the encoder's positions where these are fewer. A
        chunk's embedding then depends on its neighbours. 0 reads each chunk alone, as the paper does. Needs
        ``encoder_special_tokens=False``.
    projector_norm : {"none", "rms", "layer"}
        Norm of the chunk embeddings before the MLP.
    projector_activation : {"gelu", "gelu_tanh", "silu", "relu", "tanh", "none"}
        Between the two layers of the MLP. The paper doesn't say.
    projector_bias : bool
        Whether both layers have a bias.
    latents : int
        m, the embeddings that the projector makes of a chunk, 1 to k: a compressed chunk takes so many slots, and the
        compression is k / m at most. REFRAG has one.
    position_ids : {"contiguous", "original", "parallel"}
        Positions on the shortened sequence, or those that the rows would have in the full text (a slot takes the
        position of its chunk's last token). The paper doesn't say. "parallel" is ours: on the shortened sequence, but
        passages side by side all start where the first does, and what follows them starts behind the longest, so that
        under ``decoder_mask="passages"`` none depends on its place among them.
    decoder_mask : {"full", "passages"}
        "full" is the paper's causal attention. "passages" hides the passages from each other, as Block-Attention does
        (arXiv 2409.15355): an extension of ours.

    Raises
    ------
    ValueError
        If a field holds something else; names the field.

    Examples
    --------
    >>> from transformers import BertConfig, LlamaConfig
    >>> config = RefragConfig.from_preset("lclm", LlamaConfig(), BertConfig(), chunk_size=32)
    >>> config.pooling, config.projector_norm, config.chunk_size
    ('mean', 'rms', 32)
    """

    model_type = "refrag"
    sub_configs = {"text_config": AutoConfig, "encoder_config": AutoConfig}

    # Given as a config, a dict of its fields or None, held as a config, whose fields depend on the model's kind.
    text_config: Any = None
    encoder_config: Any = None
    chunk_size: int = 16
    pooling: str = "first"
    pool_segments: int = 8
    encoder_special_tokens: bool = True
    encoder_window: int = 0
    projector_norm: str = "none"
    projector_activation: str = "gelu"
    projector_bias: bool = True
    latents: int = 1
    position_ids: str = "contiguous"
    decoder_mask: str = "full"

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = _own_config("text_config", self.text_config, "llama")
        self.encoder_config = _own_config("encoder_config", self.encoder_config, "roberta")
        # The two hold for the whole model, and transformers looks for them at the top.
        self.tie_word_embeddings = getattr(self.text_config, "tie_word_embeddings", False)
        kwargs.pop("tie_word_embeddings", None)
        super().__post_init__(**kwargs)
        if not isinstance(self.chunk_size, int) or self.chunk_size < 1:
            raise ValueError(f"chunk_size: got {self.chunk_size!r}, needs an integer of 1 or more")
        if not isinstance(self.pool_segments, int) or self.pool_segments < 1:
            raise ValueError(f"pool_segments: got {self.pool_segments!r}, needs an integer of 1 or more")
        if not isinstance(self.encoder_window, int) or self.encoder_window < 0:
            raise ValueError(f"encoder_window: got {self.encoder_window!r}, needs an integer of 0 or more")
        if self.encoder_window and self.encoder_special_tokens:
            raise ValueError(
                f"encoder_window: got {self.encoder_window} beside encoder_special_tokens, needs 0: special tokens "
                "would stand between the chunks of a window"
            )
        if not isinstance(self.latents, int) or not 1 <= self.latents <= self.chunk_size:
            raise ValueError(f"latents: got {self.latents!r}, needs 1 to the chunk_size of {self.chunk_size}")
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"{field}: got {getattr(self, field)!r}, needs one of {', '.join(choices)}")

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return the decoder's configuration, or, of one that sees or hears too, that of its text."""
        return self.text_config.get_text_config(decoder=True)

    @property
    def chunk_width(self) -> int:
        """d_enc, the width of a chunk's embedding."""
        text = self.encoder_config.get_text_config()
        if not isinstance(getattr(text, "hidden_size", None), int):
            raise ValueError(f"encoder_config: got a {type(text).__name__}, needs one with a hidden_size")
        return text.hidden_size * (self.pool_segments if self.pooling == "concat" else 1)

    @property
    def window(self) -> int:
        """Encoder tokens of a window: ``encoder_window``, or the encoder's positions where these are fewer."""
        positions = getattr(self.encoder_config, "max_position_embeddings", None) or self.encoder_window
        if any(kind in self.encoder_config.model_type for kind in _PADDED_POSITIONS):
            positions -= (self.encoder_config.pad_token_id or 0) + 1
        return min(self.encoder_window, positions)

    @classmethod
    def from_preset(
        cls, preset: str, text_config: PreTrainedConfig, encoder_config: PreTrainedConfig, **fields: Any
    ) -> RefragConfig:
        """Make a config with a preset's choices; ``fields`` override them.

        Raises
        ------
        ValueError
            If there is no such preset.
        """
        if preset not in PRESETS:
            raise ValueError(f"preset: got {preset!r}, needs one of {', '.join(PRESETS)}")
        return cls(text_config=text_config, encoder_config=encoder_config, **{**PRESETS[preset], **fields})


def _own_config(name: str, config: Any, default: str) -> PreTrainedConfig:
    if config is None:
        return AutoConfig.for_model(default)
    if isinstance(config, dict):
        fields = dict(config)
        return AutoConfig.for_model(fields.pop("model_type", default), **fields)
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"{name}: got {type(config).__name__}, needs a config of transformers or a dict of its fields")
    return copy.deepcopy(config)


AutoConfig.register("refrag", RefragConfig)
