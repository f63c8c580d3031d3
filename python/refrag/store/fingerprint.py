"""Fingerprint: everything besides a passage's text that its chunk embeddings depend on."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from refrag.data.chunking import Chunker, describe_chunker
from refrag.model.passage_rows import SlotRule

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from refrag.model.config import RefragConfig

# Config fields that don't affect what the encoder computes, but may differ each time it is loaded.
_VOLATILE = frozenset(
    "_name_or_path architectures attn_implementation _attn_implementation dtype torch_dtype transformers_version "
    "id2label label2id use_cache gradient_checkpointing auto_map".split()
)


class TextInputs(Protocol):
    """A RefragProcessor, or any object with the attributes that determine how passages are split and tokenized."""

    tokenizer: PreTrainedTokenizerBase
    encoder_tokenizer: PreTrainedTokenizerBase
    chunker: Chunker
    encoder_special_tokens: bool
    encoder_window: int


class PassageFingerprint:
    """What both fingerprints have in common: a model and its revision, and a digest of all fields but its name."""

    name_field: ClassVar[str]  # the field with the model's name
    content: ClassVar[str]  # what is computed from a passage

    revision: str  # a field of each

    def fields(self) -> dict[str, Any]:
        """Return the fields by name."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]  # subclasses are dataclasses

    @property
    def model_name(self) -> str:
        """The model's name, for messages."""
        return str(getattr(self, self.name_field))

    @functools.cached_property
    def digest(self) -> bytes:
        """32 bytes, equal for two fingerprints only if the same is computed from a passage."""
        fields = {name: value for name, value in self.fields().items() if name != self.name_field}
        return hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=32).digest()

    def differences(self, other: PassageFingerprint) -> list[str]:
        """Return a phrase for each field that differs, with its value here and in ``other``."""
        found = []
        if self.revision != other.revision:
            names = [f"{fingerprint.model_name} (revision {fingerprint.revision})" for fingerprint in (self, other)]
            found.append(f"{self.name_field}: holds {self.content} of {names[0]}, got {names[1]}")
        theirs = other.fields()
        for name, mine in self.fields().items():
            if name not in (self.name_field, "revision") and mine != theirs[name]:
                found.append(f"{name}: holds {mine}, got {theirs[name]}")
        return found


@dataclasses.dataclass(frozen=True)
class Fingerprint(PassageFingerprint):
    """Identifies how passages become chunk embeddings: everything but the text.

    A store refuses an encoder with another fingerprint.

    Attributes
    ----------
    encoder : str
        The encoder's name, for messages only: the same weights under two names give the same embeddings.
    revision : str
        Digest of the encoder's weights and configuration.
    encoder_tokenizer : str
        Digest of the encoder's tokenizer.
    tokenizer : str
        Digest of the decoder's tokenizer, whose tokens the chunker counts.
    chunker : str
        The chunker's description, such as "fixed, k = 16".
    pooling : str
        How a chunk's rows are pooled to its embedding.
    encoder_special_tokens : bool
        As in RefragConfig.
    width : int
        d_enc.
    """

    encoder: str
    revision: str
    encoder_tokenizer: str
    tokenizer: str
    chunker: str
    pooling: str
    encoder_special_tokens: bool
    width: int

    name_field = "encoder"
    content = "embeddings"

    @classmethod
    def of(cls, encoder: PreTrainedModel, processor: TextInputs, config: RefragConfig) -> Fingerprint:
        """Compute the fingerprint of an encoder and a processor in their current state.

        This hashes all weights of the encoder.

        Raises
        ------
        ValueError
            If the processor has a custom chunker without a ``description``.
        """
        return cls(
            encoder=encoder.name_or_path or encoder.config.model_type,
            revision=encoder_digest(encoder),
            encoder_tokenizer=tokenizer_digest(processor.encoder_tokenizer),
            tokenizer=tokenizer_digest(processor.tokenizer),
            chunker=describe_chunker(processor.chunker),
            pooling=(config.pooling if config.pooling != "concat" else f"concat, {config.pool_segments} segments")
            + (f", windows of {processor.encoder_window} tokens" if processor.encoder_window else ""),
            encoder_special_tokens=processor.encoder_special_tokens,
            width=config.chunk_width,
        )


@dataclasses.dataclass(frozen=True)
class KVFingerprint(PassageFingerprint):
    """Identifies how passages become keys and values: everything but the text.

    A store refuses a decoder with another fingerprint.

    Attributes
    ----------
    decoder : str
        The decoder's name, for messages only.
    revision : str
        Digest of the decoder's weights and configuration.
    tokenizer : str
        Digest of the decoder's tokenizer.
    chunker : str
        The chunker's description, such as "fixed, k = 8".
    shared_text : str
        Tokens of the text that passages are read behind, separated by spaces.
    rule : str
    rows, whole : int
        As in ``SlotRule``.
    """

    decoder: str
    revision: str
    tokenizer: str
    chunker: str
    shared_text: str
    rule: str
    rows: int
    whole: int

    name_field = "decoder"
    content = "keys and values"

    @classmethod
    def of(
        cls, decoder: PreTrainedModel, processor: TextInputs, rule: SlotRule, shared_text: Sequence[int]
    ) -> KVFingerprint:
        """Compute the fingerprint of a decoder and a processor in their current state.

        This hashes all weights of the decoder.

        Raises
        ------
        ValueError
            If the processor has a custom chunker without a ``description``.
        """
        return cls(
            decoder=decoder.name_or_path or decoder.config.model_type,
            revision=encoder_digest(decoder),
            tokenizer=tokenizer_digest(processor.tokenizer),
            chunker=describe_chunker(processor.chunker),
            shared_text=" ".join(map(str, shared_text)),
            rule=rule.rule,
            rows=rule.rows,
            whole=rule.whole,
        )

    @property
    def shared_tokens(self) -> list[int]:
        """Tokens of the text that passages are read behind."""
        return [int(token) for token in self.shared_text.split()]

    @property
    def slot_rule(self) -> SlotRule:
        """Which rows are kept."""
        return SlotRule(self.rows, self.rule, self.whole)


def encoder_digest(encoder: PreTrainedModel) -> str:
    """Return a digest of an encoder's or a decoder's weights and configuration, 24 hexadecimal digits.

    The pooler is excluded: chunk embeddings don't use it, and transformers initializes it randomly if the checkpoint
    has none.
    """
    content = hashlib.blake2b(digest_size=12)
    config = {name: value for name, value in encoder.config.to_diff_dict().items() if name not in _VOLATILE}
    content.update(json.dumps([encoder.config.model_type, config], sort_keys=True, default=str).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        if "pooler" in name.split("."):
            continue
        content.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        content.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return content.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of everything that determines a tokenizer's token ids, 24 hexadecimal digits."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        for name in ("truncation", "padding"):  # set by the last call
            rules.pop(name, None)
    else:
        rules = [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map]
    text = json.dumps(rules, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
