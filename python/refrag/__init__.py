"""REFRAG on transformers: a decoder whose input mixes tokens with an encoder's chunk embeddings."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from refrag import deprecated

if TYPE_CHECKING:  # for type checkers; a test checks that it matches the table below
    from refrag.data.chunking import Chunker as Chunker
    from refrag.data.chunking import FixedChunks as FixedChunks
    from refrag.data.chunking import SentenceChunks as SentenceChunks
    from refrag.encoding.kv_encoder import KVEncoder as KVEncoder
    from refrag.encoding.passage_encoder import PassageEncoder as PassageEncoder
    from refrag.model.config import RefragConfig as RefragConfig
    from refrag.model.encoder import TextEmbedder as TextEmbedder
    from refrag.model.inputs import Chunk as Chunk
    from refrag.model.inputs import MixedPrompt as MixedPrompt
    from refrag.model.inputs import PackedTexts as PackedTexts
    from refrag.model.inputs import Passage as Passage
    from refrag.model.inputs import PromptTooLongError as PromptTooLongError
    from refrag.model.modeling import RefragForCausalLM as RefragForCausalLM
    from refrag.model.passage_cache import PassageCache as PassageCache
    from refrag.model.passage_rows import SlotRule as SlotRule
    from refrag.model.policy import ExpansionPolicy as ExpansionPolicy
    from refrag.model.state import GenerationState as GenerationState
    from refrag.processing.processor import RefragProcessor as RefragProcessor
    from refrag.processing.selectors import AllChunks as AllChunks
    from refrag.processing.selectors import AttentionSelector as AttentionSelector
    from refrag.processing.selectors import CosineSelector as CosineSelector
    from refrag.processing.selectors import NoChunks as NoChunks
    from refrag.processing.selectors import PerplexitySelector as PerplexitySelector
    from refrag.processing.selectors import PolicySelector as PolicySelector
    from refrag.processing.selectors import RandomSelector as RandomSelector
    from refrag.processing.selectors import Selector as Selector
    from refrag.processing.selectors import ThresholdSelector as ThresholdSelector
    from refrag.store.fingerprint import Fingerprint as Fingerprint
    from refrag.store.fingerprint import KVFingerprint as KVFingerprint
    from refrag.store.kv_store import KVStore as KVStore
    from refrag.store.shard import StoreError as StoreError
    from refrag.store.store import ChunkStore as ChunkStore
    from refrag.store.store import UnknownPassageError as UnknownPassageError

# Imported on first use: torch and transformers take seconds to import, and "refrag --help" shouldn't wait for them.
_NAMES_OF = {
    "data.chunking": "Chunker FixedChunks SentenceChunks",
    "encoding.kv_encoder": "KVEncoder",
    "encoding.passage_encoder": "PassageEncoder",
    "model.config": "RefragConfig",
    "model.encoder": "TextEmbedder",
    "model.inputs": "Chunk MixedPrompt PackedTexts Passage PromptTooLongError",
    "model.modeling": "RefragForCausalLM",
    "model.passage_cache": "PassageCache",
    "model.passage_rows": "SlotRule",
    "model.policy": "ExpansionPolicy",
    "model.state": "GenerationState",
    "processing.processor": "RefragProcessor",
    "processing.selectors": "AllChunks AttentionSelector CosineSelector NoChunks PerplexitySelector PolicySelector "
    "RandomSelector Selector ThresholdSelector",
    "store.fingerprint": "Fingerprint KVFingerprint",
    "store.kv_store": "KVStore",
    "store.shard": "StoreError",
    "store.store": "ChunkStore UnknownPassageError",
}
_MODULE_OF = {name: f"refrag.{module}" for module, names in _NAMES_OF.items() for name in names.split()}

__all__ = sorted(_MODULE_OF)

deprecated.install()
_renamed = deprecated.renamed(__name__)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        return _renamed(name)
    return getattr(importlib.import_module(_MODULE_OF[name]), name)
