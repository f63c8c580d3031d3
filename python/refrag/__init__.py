"""REFRAG on transformers: an encoder whose chunk embeddings stand among a decoder's tokens."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refrag.data.chunking import Chunker, FixedChunks, SentenceChunks
    from refrag.encoding.passage_encoder import PassageEncoder
    from refrag.model.config import RefragConfig
    from refrag.model.encoder import TextEmbedder
    from refrag.model.inputs import Chunk, MixedPrompt, PackedTexts, Passage, PromptTooLongError
    from refrag.model.modeling import RefragForCausalLM
    from refrag.model.passage_cache import PassageCache
    from refrag.model.policy import ExpansionPolicy
    from refrag.model.state import GenerationState
    from refrag.processing.processor import RefragProcessor
    from refrag.processing.selectors import (
        AllChunks,
        Chooser,
        CosineChooser,
        NoChunks,
        PerplexityChooser,
        PolicyChooser,
        RandomChooser,
        ThresholdChooser,
    )
    from refrag.store.fingerprint import ChunkRecipe
    from refrag.store.shard import StoreError
    from refrag.store.store import ChunkStore, UnknownPassageError

# Loaded when first asked for: torch and transformers take seconds, which "refrag --help" needn't wait for.
_MODULE_OF = {
    "AllChunks": "processing.selectors",
    "Chooser": "processing.selectors",
    "Chunk": "model.inputs",
    "ChunkRecipe": "store.fingerprint",
    "ChunkStore": "store.store",
    "Chunker": "data.chunking",
    "CosineChooser": "processing.selectors",
    "ExpansionPolicy": "model.policy",
    "FixedChunks": "data.chunking",
    "GenerationState": "model.state",
    "MixedPrompt": "model.inputs",
    "NoChunks": "processing.selectors",
    "PackedTexts": "model.inputs",
    "Passage": "model.inputs",
    "PassageCache": "model.passage_cache",
    "PassageEncoder": "encoding.passage_encoder",
    "PerplexityChooser": "processing.selectors",
    "PolicyChooser": "processing.selectors",
    "PromptTooLongError": "model.inputs",
    "RandomChooser": "processing.selectors",
    "RefragConfig": "model.config",
    "RefragForCausalLM": "model.modeling",
    "RefragProcessor": "processing.processor",
    "SentenceChunks": "data.chunking",
    "StoreError": "store.shard",
    "TextEmbedder": "model.encoder",
    "ThresholdChooser": "processing.selectors",
    "UnknownPassageError": "store.store",
}

__all__ = [
    "AllChunks",
    "Chooser",
    "Chunk",
    "ChunkRecipe",
    "ChunkStore",
    "Chunker",
    "CosineChooser",
    "ExpansionPolicy",
    "FixedChunks",
    "GenerationState",
    "MixedPrompt",
    "NoChunks",
    "PackedTexts",
    "Passage",
    "PassageCache",
    "PassageEncoder",
    "PerplexityChooser",
    "PolicyChooser",
    "PromptTooLongError",
    "RandomChooser",
    "RefragConfig",
    "RefragForCausalLM",
    "RefragProcessor",
    "SentenceChunks",
    "StoreError",
    "TextEmbedder",
    "ThresholdChooser",
    "UnknownPassageError",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
