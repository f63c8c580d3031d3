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
    from refrag.config import RefragConfig
    from refrag.data.chunking import Chunker, FixedChunks, SentenceChunks
    from refrag.encoder import TextEmbedder
    from refrag.model import RefragForCausalLM
    from refrag.passage_cache import PassageCache
    from refrag.passage_encoder import PassageEncoder
    from refrag.policy import ExpansionPolicy
    from refrag.processor import RefragProcessor
    from refrag.prompt import Chunk, MixedPrompt, PackedTexts, Passage, PromptTooLongError
    from refrag.recipe import ChunkRecipe
    from refrag.shard import StoreError
    from refrag.state import GenerationState
    from refrag.store import ChunkStore, UnknownPassageError

# Loaded when first asked for: torch and transformers take seconds, which "refrag --help" needn't wait for.
_MODULE_OF = {
    "AllChunks": "choosers",
    "Chooser": "choosers",
    "Chunk": "prompt",
    "ChunkRecipe": "recipe",
    "ChunkStore": "store",
    "Chunker": "data.chunking",
    "CosineChooser": "choosers",
    "ExpansionPolicy": "policy",
    "FixedChunks": "data.chunking",
    "GenerationState": "state",
    "MixedPrompt": "prompt",
    "NoChunks": "choosers",
    "PackedTexts": "prompt",
    "Passage": "prompt",
    "PassageCache": "passage_cache",
    "PassageEncoder": "passage_encoder",
    "PerplexityChooser": "choosers",
    "PolicyChooser": "choosers",
    "PromptTooLongError": "prompt",
    "RandomChooser": "choosers",
    "RefragConfig": "config",
    "RefragForCausalLM": "model",
    "RefragProcessor": "processor",
    "SentenceChunks": "data.chunking",
    "StoreError": "shard",
    "TextEmbedder": "encoder",
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
