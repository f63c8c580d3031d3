"""REFRAG on transformers: an encoder whose chunk embeddings stand among a decoder's tokens."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refrag.choosers import (
        AllChunks,
        Chooser,
        CosineChooser,
        NoChunks,
        PerplexityChooser,
        PolicyChooser,
        RandomChooser,
        ThresholdChooser,
    )
    from refrag.data.chunking import Chunker, FixedChunks, SentenceChunks
    from refrag.model.config import RefragConfig
    from refrag.model.encoder import TextEmbedder
    from refrag.model.inputs import Chunk, MixedPrompt, PackedTexts, Passage, PromptTooLongError
    from refrag.model.modeling import RefragForCausalLM
    from refrag.model.passage_cache import PassageCache
    from refrag.model.policy import ExpansionPolicy
    from refrag.model.state import GenerationState
    from refrag.passage_encoder import PassageEncoder
    from refrag.processor import RefragProcessor
    from refrag.recipe import ChunkRecipe
    from refrag.shard import StoreError
    from refrag.store import ChunkStore, UnknownPassageError

# Loaded when first asked for: torch and transformers take seconds, which "refrag --help" needn't wait for.
_MODULE_OF = {
    "AllChunks": "choosers",
    "Chooser": "choosers",
    "Chunk": "model.inputs",
    "ChunkRecipe": "recipe",
    "ChunkStore": "store",
    "Chunker": "data.chunking",
    "CosineChooser": "choosers",
    "ExpansionPolicy": "model.policy",
    "FixedChunks": "data.chunking",
    "GenerationState": "model.state",
    "MixedPrompt": "model.inputs",
    "NoChunks": "choosers",
    "PackedTexts": "model.inputs",
    "Passage": "model.inputs",
    "PassageCache": "model.passage_cache",
    "PassageEncoder": "passage_encoder",
    "PerplexityChooser": "choosers",
    "PolicyChooser": "choosers",
    "PromptTooLongError": "model.inputs",
    "RandomChooser": "choosers",
    "RefragConfig": "model.config",
    "RefragForCausalLM": "model.modeling",
    "RefragProcessor": "processor",
    "SentenceChunks": "data.chunking",
    "StoreError": "shard",
    "TextEmbedder": "model.encoder",
    "ThresholdChooser": "choosers",
    "UnknownPassageError": "store",
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
