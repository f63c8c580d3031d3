"""Selectors pick the chunks to expand. This module has their protocol, the paper's methods (REFRAG, A.1) and others.

A selector is called for one prompt, with its question, its chunks and the number of chunks to pick. The chunks that it
picks are expanded: the decoder reads their text. The rest are compressed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from refrag.model.acceptance import require_decoder
from refrag.model.attention import AttentionPlans, packed_pass
from refrag.model.inputs import Chunk, MixedPrompt
from refrag.model.passage_cache import PassageCache
from refrag.model.policy import ExpansionPolicy, sample_picks
from refrag.model.slot_scores import chunk_attention
from refrag_kernels import ChunkLayout, ChunkMask

Embed = Callable[[Sequence[str]], torch.Tensor]  # texts -> embeddings [N, d], such as refrag.model.encoder.TextEmbedder

_ROWS = 1024  # rows whose logits are in memory at once: half a gigabyte with a vocabulary of 128k tokens


class Selector(Protocol):
    """Picks chunks of one prompt.

    It takes the question, the prompt's chunks and ``count``, the number of chunks to pick, from 0 to all; None lets the
    selector decide. It returns the indices of the picked chunks, each once. A selector with a criterion of its own,
    such as a threshold, may pick fewer than ``count`` chunks; no selector may pick more.
    """

    def __call__(self, question: str, chunks: Sequence[Chunk], count: int | None) -> Collection[int]: ...


class NoChunks:
    """Expands no chunk."""

    def __call__(self, question: str, chunks: Sequence[Chunk], count: int | None) -> Collection[int]:
        if count:
            raise ValueError(f"expand: got {count} chunks for NoChunks, needs none")
        return []


class AllChunks:
    """Expands every chunk.

    Raises
    ------
    ValueError
        If ``count`` is less than the number of chunks.
    """

    def __call__(self, question: str, chunks: Sequence[Chunk], count: int | None) -> Collection[int]:
        if count not in (None, len(chunks)):
            raise ValueError(f"expand: got {count} chunks for AllChunks, needs all {len(chunks)}")
        return range(len(chunks))


class RandomSelector:
    """Expands random chunks: the paper's baseline, also used in its fine-tuning before the policy (A.1).

    Parameters
    ----------
    seed : int
    """

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def __call__(self, question: str, chunks: Sequence[Chunk], count: int | None) -> Collection[int]:
        return torch.randperm(len(chunks), generator=self.generator, device="cpu")[: _required(self, count)].tolist()


class CosineSelector:
    """Expands the chunks whose embeddings have the highest cosine similarity to the question's.

    Parameters
    ----------
    embed : callable
        Texts -> embeddings [N, d]. One model embeds both questions and chunks.
    """

    def __init__(self, embed: Embed) -> None:
        self.embed = embed

    def __call__(self, question: str, chunks: Sequence[Chunk], count: int | None) -> Collection[int]:
        count = _required(self, count)
        return _cosines(self.embed, question, chunks).topk(count).indices.tolist() if count else []


class ThresholdSelector:
    """Expands every chunk whose cosine similarity to the question reaches a threshold.

    Parameters
    ----------
    embed : callable
        As for CosineSelector.
    threshold : float
        From -1 to 1.

    Raises
    ------
    ValueError
        If the threshold is outside that range.
    """

    def __init__(self, embed: Embed, threshold: float) -> None:
        if not -1 <= threshold <= 1:
            raise ValueError(f"threshold: got {threshold}, needs a cosine from -1 to 1")
        self.embed = embed
        self.threshold = threshold

    def __call__(self, question: str, chunks: Sequence[Chunk], count: int | None) -> Collection[int]:
        """Pick the chunks that reach the threshold, at most the ``count`` best of them."""
        if count == 0 or not chunks:
            return []
        best, order = _cosines(self.embed, question, chunks).sort(descending=True, stable=True)
        return order[best >= self.threshold][:count].tolist()


class PerplexitySelector:
    """Expands chunks by the decoder's perplexity on them: two of the paper's baselines (A.1).

    The paper doesn't specify a chunk's context. Here the decoder reads each chunk on its own, after one start token, so
    that one packed forward pass scores the full text of all chunks.

    Parameters
    ----------
    model : RefragForCausalLM
    order : {"desc", "asc"}
        "desc" expands the chunks with the highest perplexity and compresses the rest; "asc" expands the chunks with
        the lowest.
    start : int, optional
        The start token. Defaults to the decoder's ``bos_token_id``, or ``eos_token_id`` if it has none.

    Raises
    ------
    ValueError
        If ``order`` is neither "desc" nor "asc", or there is no start token.
    """

    def __init__(self, model: Any, order: str = "desc", start: int | None = None) -> None:
        if order not in ("asc", "desc"):
            raise ValueError(f"order: got {order!r}, needs asc or desc")
        self.decoder = model.decoder
        self.order = order
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(self.decoder.config.get_text_config(), name, None)
            start = (token[0] if isinstance(token, list) else token) if start is None else start
        if start is None:
            raise ValueError(
                "start: got None, needs a token: the decoder's config has neither bos_token_id nor eos_token_id"
            )
        self.start = start

    def __call__(self, question: str, chunks: Sequence[Chunk], count: int | None) -> Collection[int]:
        count = _required(self, count)
        if not count:
            return []
        return self.log_perplexities(chunks).topk(count, largest=self.order == "desc").indices.tolist()

    def log_perplexities(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Return the mean negative log-likelihood of each chunk's tokens, float32 [N]."""
        require_decoder(self.decoder)
        result: list[torch.Tensor] = []
        batch: list[tuple[int, ...]] = []
        rows = 0
        with torch.no_grad():
            for chunk in chunks:
                if batch and rows + len(chunk.token_ids) > _ROWS:
                    result.append(self._read(batch))
                    batch, rows = [], 0
                batch.append(chunk.token_ids)
                rows += len(chunk.token_ids)
            result.append(self._read(batch))
        return torch.cat(result)

    def _read(self, texts: Sequence[tuple[int, ...]]) -> torch.Tensor:
        device = self.decoder.device
        lengths = [len(text) for text in texts]
        layout = ChunkLayout.from_lengths([[length] for length in lengths]).to(device)
        rows = [token for text in texts for token in (self.start, *text[:-1])]
        logits = packed_pass(
            self.decoder,
            AttentionPlans(layout, ChunkMask.full(), causal=True),
            input_ids=torch.tensor([rows], device=device),
            position_ids=torch.tensor([[row for length in lengths for row in range(length)]], device=device),
            use_cache=False,
        ).logits[0]
        targets = torch.tensor([token for text in texts for token in text], device=device)
        losses = nn.functional.cross_entropy(logits.float(), targets, reduction="none").split(lengths)
        return torch.stack([loss.mean() for loss in losses]).cpu()


class PolicySelector:
    """Expands the chunks that a trained policy scores highest, or samples them from the policy (REFRAG, A.1).

    Parameters
    ----------
    policy : ExpansionPolicy
    embed : callable
        Texts -> chunk embeddings from the model's encoder, on which the policy was trained.
    generator : torch.Generator, optional
        Samples the picks; without it, the chunks with the highest scores are picked.
    """

    def __init__(self, policy: ExpansionPolicy, embed: Embed, generator: torch.Generator | None = None) -> None:
        self.policy = policy
        self.embed = embed
        self.generator = generator

    def __call__(self, question: str, chunks: Sequence[Chunk], count: int | None) -> Collection[int]:
        count = _required(self, count)
        if not count:
            return []
        with torch.no_grad():
            scores = self.policy(self.embed([chunk.text for chunk in chunks])[None])
            if self.generator is not None:
                return sample_picks(scores, count, self.generator)[0].tolist()
            return scores[0].topk(count).indices.tolist()


class AttentionSelector:
    """Expands the chunks whose key/value slots receive most attention from the text after them: the question's rows.

    An extension of ours, which needs no training. The processor packs a prompt with all chunks compressed, this
    selector sends its text through the decoder, and the processor then expands the chunks that received most, whose
    full rows come from the cache or the store, or are read once. Reading the prompt afterwards is a second pass over
    its text.

    Parameters
    ----------
    model : RefragForCausalLM
        With ``slots="kv"``.
    cache : PassageCache, optional
        Provides the passages' rows, unless a store does; with ``full=True``, so that no passage is read twice.

    Raises
    ------
    ValueError
        If the model has embedding slots.
    """

    def __init__(self, model: Any, cache: PassageCache | None = None) -> None:
        if model.config.kv_slots is None:
            raise ValueError("model: got embedding slots, needs slots='kv': attention to rows of keys and values")
        self.model = model
        self.cache = cache

    def __call__(self, question: str, chunks: Sequence[Chunk], count: int | None) -> Collection[int]:
        raise TypeError("selector: AttentionSelector needs the whole prompt: pass it to a processor with kv_slots")

    def pick(self, prompt: MixedPrompt, counts: Sequence[int | None]) -> tuple[set[int], MixedPrompt]:
        """Pick chunks of a packed prompt.

        Parameters
        ----------
        prompt : MixedPrompt
            With key/value slots; chunks that are whole already aren't picked.
        counts : sequence of int
            The number of chunks to pick in each sequence.

        Returns
        -------
        set of int
            Chunks, counted through the batch.
        MixedPrompt
            The prompt with the rows of its passages.
        """
        needed = [_required(self, count) for count in counts]
        if self.cache is not None and prompt.passages is None:
            prompt = self.cache.attach(prompt)
        scores, prompt = chunk_attention(self.model, prompt)
        scores[list(prompt.expanded)] = -1  # below any attention
        picked: set[int] = set()
        first = 0
        for own, count in zip(prompt.chunks_per_sequence(), needed, strict=True):
            free = own - sum(first <= chunk < first + own for chunk in prompt.expanded)
            best = scores[first : first + own].sort(descending=True, stable=True).indices[: min(count, free)]
            picked.update((first + best).tolist())
            first += own
        return picked, prompt


NAMES = ("nothing", "everything", "random", "cosine", "threshold", "perplexity-asc", "perplexity-desc", "policy",
         "attention")  # fmt: skip


def by_name(
    name: str,
    *,
    model: Any = None,
    embed: Embed | None = None,
    threshold: float | None = None,
    policy: ExpansionPolicy | None = None,
    seed: int = 0,
) -> Selector:
    """Create a selector from its name on the command line.

    Parameters
    ----------
    name : str
        One of ``NAMES``.
    model : RefragForCausalLM, optional
        For perplexity-asc, perplexity-desc and attention.
    embed : callable, optional
        For cosine, threshold and policy.
    threshold : float, optional
        For threshold.
    policy : ExpansionPolicy, optional
        For policy.
    seed : int
        For random.

    Raises
    ------
    ValueError
        If no selector has this name, or an argument that it needs is missing.

    Examples
    --------
    >>> chunks = [Chunk("a", (5,)), Chunk("b", (6,)), Chunk("c", (7,))]
    >>> len(by_name("random", seed=1)("Which?", chunks, 2))
    2
    >>> list(by_name("everything")("Which?", chunks, None))
    [0, 1, 2]
    """
    if name not in NAMES:
        raise ValueError(f"selector: got {name!r}, needs one of {', '.join(NAMES)}")
    needs_of: dict[str, dict[str, Any]] = {
        "cosine": {"embed": embed},
        "threshold": {"embed": embed, "threshold": threshold},
        "perplexity-asc": {"model": model},
        "perplexity-desc": {"model": model},
        "policy": {"policy": policy, "embed": embed},
        "attention": {"model": model},
    }
    needs = needs_of.get(name, {})
    for argument, value in needs.items():
        if value is None:
            raise ValueError(f"{argument}: got None, but the selector {name!r} needs it")
    if name.startswith("perplexity"):
        return PerplexitySelector(model, name.removeprefix("perplexity-"))
    makers: dict[str, Callable[..., Selector]] = {
        "nothing": NoChunks, "everything": AllChunks, "cosine": CosineSelector, "threshold": ThresholdSelector,
        "policy": PolicySelector, "attention": AttentionSelector,
    }  # fmt: skip
    return RandomSelector(seed) if name == "random" else makers[name](**needs)


def _required(selector: Selector, count: int | None) -> int:
    if count is None:
        raise ValueError(f"expand: got None, {type(selector).__name__} needs a fraction or a number of chunks to pick")
    return count


def _cosines(embed: Embed, question: str, chunks: Sequence[Chunk]) -> torch.Tensor:
    # Embed the chunks last: a TextEmbedder caches its latest texts, and the model reuses the chunks' embeddings.
    asked, texts = embed([question]).float(), embed([chunk.text for chunk in chunks]).float()
    return nn.functional.cosine_similarity(texts, asked)
