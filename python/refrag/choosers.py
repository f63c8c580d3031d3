"""Which chunks to expand: a protocol, and two simple ways."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import torch

from refrag.prompt import Chunk


class Chooser(Protocol):
    """Picks ``count`` of the chunks of one prompt; the rest is compressed."""

    def __call__(self, question: str, chunks: Sequence[Chunk], count: int) -> Collection[int]: ...


class RandomChooser:
    """Chunks at random: the paper's baseline, and its fine-tuning before the policy (A.1).

    Parameters
    ----------
    seed : int
    """

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, question: str, chunks: Sequence[Chunk], count: int) -> Collection[int]:
        return torch.randperm(len(chunks), generator=self.generator)[:count].tolist()


class CosineChooser:
    """The chunks whose embedding is nearest to the question's, by cosine.

    Parameters
    ----------
    embed : callable
        Texts -> embeddings [N, d], by one model for questions and chunks.
    """

    def __init__(self, embed: Callable[[Sequence[str]], torch.Tensor]) -> None:
        self.embed = embed

    def __call__(self, question: str, chunks: Sequence[Chunk], count: int) -> Collection[int]:
        if not count:
            return []
        embeds = self.embed([question, *(chunk.text for chunk in chunks)]).float()
        embeds = torch.nn.functional.normalize(embeds, dim=-1)
        return (embeds[1:] @ embeds[0]).topk(count).indices.tolist()
