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
    from refrag.chunking import Chunker, FixedChunks, SentenceChunks
    from refrag.config import RefragConfig
    from refrag.encoder import TextEmbedder
    from refrag.model import RefragForCausalLM
    from refrag.policy import ExpansionPolicy
    from refrag.processor import PromptTooLongError, RefragProcessor
    from refrag.prompt import Chunk, MixedPrompt, PackedTexts, Passage

# Loaded when first asked for: torch and transformers take seconds, which "refrag --help" needn't wait for.
_MODULE_OF = {
    "AllChunks": "choosers",
    "Chooser": "choosers",
    "Chunk": "prompt",
    "Chunker": "chunking",
    "CosineChooser": "choosers",
    "ExpansionPolicy": "policy",
    "FixedChunks": "chunking",
    "MixedPrompt": "prompt",
    "NoChunks": "choosers",
    "PackedTexts": "prompt",
    "Passage": "prompt",
    "PerplexityChooser": "choosers",
    "PolicyChooser": "choosers",
    "PromptTooLongError": "processor",
    "RandomChooser": "choosers",
    "RefragConfig": "config",
    "RefragForCausalLM": "model",
    "RefragProcessor": "processor",
    "SentenceChunks": "chunking",
    "TextEmbedder": "encoder",
    "ThresholdChooser": "choosers",
}

__all__ = [
    "AllChunks",
    "Chooser",
    "Chunk",
    "Chunker",
    "CosineChooser",
    "ExpansionPolicy",
    "FixedChunks",
    "MixedPrompt",
    "NoChunks",
    "PackedTexts",
    "Passage",
    "PerplexityChooser",
    "PolicyChooser",
    "PromptTooLongError",
    "RandomChooser",
    "RefragConfig",
    "RefragForCausalLM",
    "RefragProcessor",
    "SentenceChunks",
    "TextEmbedder",
    "ThresholdChooser",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
