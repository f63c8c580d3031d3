"""RefragConfig: the configs of the encoder and the decoder, and how chunk embeddings connect the two."""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from refrag.model.passage_rows import RULES, SlotRule

_CHOICES = {
    "pooling": ("first", "mean", "last", "concat"),
    "projector_norm": ("none", "rms", "layer"),
    "projector_activation": ("gelu", "gelu_tanh", "silu", "relu", "tanh", "none"),
    "position_ids": ("contiguous", "original", "parallel"),
    "decoder_mask": ("full", "passages"),
    "slots": ("embedding", "kv"),
    "slot_rule": RULES,
}

# Families whose position table reserves its first rows for padding.
_PADDED_POSITIONS = ("roberta", "camembert", "mpnet", "xmod", "data2vec-text", "longformer", "luke", "ibert")

# Values for what the paper leaves open. "paper": REFRAG, section 2 and B.2, with the first token ([CLS]) as the chunk's
# embedding. "lclm": arXiv 2606.09659, windows of 1,024 tokens encoded together, the mean over a chunk's own tokens, and
# a norm before the MLP. "tokens": ours, for token_encoder, keeps the chunk's tokens in order and has no activation in
# the projector, which then learns from far less text. "kv": ours, slots of the decoder's own keys and values, which
# need no training; the encoder then only serves selectors.
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
    "kv": {
        "pooling": "mean",
        "encoder_special_tokens": False,
        "slots": "kv",
        "decoder_mask": "passages",
        "position_ids": "original",
    },
}


class RefragConfig(PreTrainedConfig):
    """Configuration of a RefragForCausalLM.

    The configs of the encoder and the decoder are copied: a composite config in transformers resets the attention of
    its parts, and an existing model that shared its config would silently stop being causal.

    Parameters
    ----------
    text_config, encoder_config : PreTrainedConfig or dict
        The decoder's and the encoder's configuration.
    chunk_size : int
        k, the number of decoder tokens in a chunk.
    pooling : {"first", "mean", "last", "concat"}
        How the encoder's rows are pooled to a chunk's embedding. The paper doesn't specify it. "concat" splits the rows
        into ``pool_segments`` runs and concatenates the runs' means, which preserves their order.
    pool_segments : int
        Number of runs for "concat".
    encoder_special_tokens : bool
        Whether the encoder reads each chunk between its special tokens ([CLS] and [SEP]); pooling "first" needs them.
        Without them, a jointly trained encoder reads 2 rows less per chunk: a ninth of its work at k = 16.
    encoder_window : int
        Number of encoder tokens in a window. Adjacent chunks of a passage that fit into one window, or into the
        encoder's positions if these are fewer, attend to each other in the encoder, so that a chunk's embedding depends
        on its neighbours. 0 encodes each chunk on its own, as in the paper. Needs ``encoder_special_tokens=False``.
    projector_norm : {"none", "rms", "layer"}
        Norm of the chunk embeddings before the MLP.
    projector_activation : {"gelu", "gelu_tanh", "silu", "relu", "tanh", "none"}
        Activation between the two layers of the MLP. The paper doesn't specify it.
    projector_bias : bool
        Whether both layers have a bias.
    latents : int
        m, the number of embeddings that the projector outputs per chunk, from 1 to k. A compressed chunk takes m slots,
        and the compression rate is at most k / m. REFRAG uses 1.
    position_ids : {"contiguous", "original", "parallel"}
        "contiguous" numbers the rows of the shortened sequence; "original" gives each row its position in the full text
        (a slot takes the position of its chunk's last token). The paper doesn't specify it. "parallel" is our
        extension: it numbers the shortened sequence, but adjacent passages all start at the position of the first, and
        the text after them starts after the longest. Under ``decoder_mask="passages"``, a passage then doesn't depend
        on the order of the passages.
    decoder_mask : {"full", "passages"}
        "full" is the paper's causal attention. "passages" is our extension: passages don't attend to each other, as in
        Block-Attention (arXiv 2409.15355).
    slots : {"embedding", "kv"}
        What a compressed chunk is to the decoder: "embedding" is the paper's, the projected embedding of an encoder.
        "kv" is our extension: rows of keys and values of the decoder itself, which has read the passage once. It needs
        ``decoder_mask="passages"`` and position ids that count all tokens, "original" or "parallel".
    slot_rows : int
        For "kv": number of rows that each layer and head keeps of a chunk, from 1 to k.
    slot_rule : {"received", "distinct"}
        For "kv": which rows are kept; see ``SlotRule``.
    slot_whole : int
        For "kv": number of chunks at the end of each passage that keep all their rows.

    Raises
    ------
    ValueError
        If a field has an invalid value. The message names the field.

    Examples
    --------
    >>> from transformers import BertConfig, LlamaConfig
    >>> config = RefragConfig.from_preset("lclm", LlamaConfig(), BertConfig(), chunk_size=32)
    >>> config.pooling, config.projector_norm, config.chunk_size
    ('mean', 'rms', 32)
    """

    model_type = "refrag"
    sub_configs = {"text_config": AutoConfig, "encoder_config": AutoConfig}

    # Accepts a config, a dict of its fields, or None; stored as a config, whose fields depend on the model type.
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
    slots: str = "embedding"
    slot_rows: int = 1
    slot_rule: str = "received"
    slot_whole: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = _own_config("text_config", self.text_config, "llama")
        self.encoder_config = _own_config("encoder_config", self.encoder_config, "roberta")
        # tie_word_embeddings applies to the whole model: transformers looks for it in the composite config.
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
                f"encoder_window: got {self.encoder_window} with encoder_special_tokens, needs 0: special tokens "
                "would separate the chunks of a window"
            )
        if not isinstance(self.latents, int) or not 1 <= self.latents <= self.chunk_size:
            raise ValueError(f"latents: got {self.latents!r}, needs 1 to the chunk_size of {self.chunk_size}")
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"{field}: got {getattr(self, field)!r}, needs one of {', '.join(choices)}")
        if not isinstance(self.slot_rows, int) or not 1 <= self.slot_rows <= self.chunk_size:
            raise ValueError(f"slot_rows: got {self.slot_rows!r}, needs 1 to the chunk_size of {self.chunk_size}")
        if not isinstance(self.slot_whole, int) or self.slot_whole < 0:
            raise ValueError(f"slot_whole: got {self.slot_whole!r}, needs an integer of 0 or more")
        if self.slots == "kv":
            for field, needed in (("decoder_mask", ("passages",)), ("position_ids", ("original", "parallel"))):
                if getattr(self, field) not in needed:
                    raise ValueError(
                        f"{field}: got {getattr(self, field)!r} with slots='kv', needs {' or '.join(needed)}: a "
                        "passage is read on its own, and its rows keep their positions"
                    )

    @property
    def kv_slots(self) -> SlotRule | None:
        """Which rows key/value slots keep; None for embedding slots."""
        return SlotRule(self.slot_rows, self.slot_rule, self.slot_whole) if self.slots == "kv" else None

    def use_kv_slots(self, rule: SlotRule) -> None:
        """Switch to key/value slots with this rule; no weights change.

        Raises
        ------
        ValueError
            If the rule keeps more rows than a chunk has.
        """
        if rule.rows > self.chunk_size:
            raise ValueError(f"rows: got {rule.rows}, needs 1 to the chunk_size of {self.chunk_size}")
        self.slots, self.slot_rows, self.slot_rule, self.slot_whole = "kv", rule.rows, rule.rule, rule.whole
        self.decoder_mask = "passages"
        self.position_ids = "original" if self.position_ids == "contiguous" else self.position_ids

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return the decoder's config, or the config of its text model if it is multimodal."""
        return self.text_config.get_text_config(decoder=True)

    @property
    def chunk_width(self) -> int:
        """d_enc, the size of a chunk's embedding."""
        text = self.encoder_config.get_text_config()
        if not isinstance(getattr(text, "hidden_size", None), int):
            raise ValueError(f"encoder_config: got a {type(text).__name__}, needs one with a hidden_size")
        return text.hidden_size * (self.pool_segments if self.pooling == "concat" else 1)

    @property
    def window(self) -> int:
        """Encoder tokens in a window: ``encoder_window``, or the encoder's positions if these are fewer."""
        positions = getattr(self.encoder_config, "max_position_embeddings", None) or self.encoder_window
        if any(kind in self.encoder_config.model_type for kind in _PADDED_POSITIONS):
            positions -= (self.encoder_config.pad_token_id or 0) + 1
        return min(self.encoder_window, positions)

    @classmethod
    def from_preset(
        cls, preset: str, text_config: PreTrainedConfig, encoder_config: PreTrainedConfig, **fields: Any
    ) -> RefragConfig:
        """Create a config from a preset; ``fields`` override its values.

        Raises
        ------
        ValueError
            If the preset is unknown.
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
