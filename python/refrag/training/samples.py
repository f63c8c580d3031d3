"""Training samples: spans of text and chunks, and the span that the model learns to write."""

from __future__ import annotations

import dataclasses
import functools
import operator
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from refrag.bundle import ModelBundle
from refrag.data.chunking import end_of_chunk
from refrag.data.documents import Windows
from refrag.model.inputs import Chunk, MixedPrompt, Passage
from refrag.model.packing import Span, pack_spans
from refrag.processing.processor import RefragProcessor

Sampler = Callable[[int], "Sample"]  # index -> sample; deterministic


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sequence.

    Attributes
    ----------
    spans : tuple of Span
        Text and chunks, in order.
    target : int
        Index of the span that the model learns to write; it is text, and follows its context.
    expanded : frozenset of int
        Chunks that are expanded to text.
    latents : int
        Slots per compressed chunk.
    """

    spans: tuple[Span, ...]
    target: int
    expanded: frozenset[int] = frozenset()
    latents: int = 1

    @property
    def num_chunks(self) -> int:
        """Number of chunks, expanded or not."""
        return sum(isinstance(span, Chunk) for _, span in self.spans)

    @property
    def num_targets(self) -> int:
        """Number of tokens in the loss."""
        return len(self.spans[self.target][1])  # type: ignore[arg-type]

    @property
    def num_rows(self) -> int:
        """Number of rows that the decoder reads."""
        rows, chunk = 0, 0
        for _, span in self.spans:
            if isinstance(span, Chunk):
                rows += len(span.token_ids) if chunk in self.expanded else self.latents
                chunk += 1
            else:
                rows += len(span)
        return rows


def chunks_of(
    token_ids: Sequence[int], k: int, tokenizer: PreTrainedTokenizerBase, cuttable: Sequence[bool] | None = None
) -> list[Chunk]:
    """Cut tokens into chunks of at most k tokens, as ``FixedChunks`` cuts their text.

    Parameters
    ----------
    token_ids : sequence of int
        The first must begin a character.
    k : int
    tokenizer : PreTrainedTokenizerBase
        The decoder's.
    cuttable : sequence of bool, optional
        For each token, whether a chunk may end with it; by default any may.
    """
    places = [True] * len(token_ids) if cuttable is None else cuttable
    pieces: list[tuple[int, ...]] = []
    first = 0
    while first < len(token_ids):
        end = end_of_chunk(places, first, k)
        pieces.append(tuple(token_ids[first:end]))
        first = end
    # Decode each chunk together with the previous one: some tokenizers drop the leading space of a text.
    befores = [(), *pieces[:-1]]
    runs = [list(run) for run in [*befores, *map(operator.add, befores, pieces)]]
    texts = tokenizer.batch_decode(runs, clean_up_tokenization_spaces=False)
    return [Chunk(text[len(before) :], piece) for before, text, piece in zip(texts, texts[len(pieces) :], pieces)]


def reconstruction(
    token_ids: Sequence[int],
    k: int,
    tokenizer: PreTrainedTokenizerBase,
    prefix: list[int],
    cuttable: Sequence[bool] | None = None,
) -> Sample:
    """Return a reconstruction sample: write x_1:s from its s/k chunks (REFRAG, 3.1), up to its last whole character."""
    end = len(token_ids) if cuttable is None else end_of_chunk(cuttable, 0, len(token_ids))
    chunks: list[Span] = [(0, chunk) for chunk in chunks_of(token_ids[:end], k, tokenizer, cuttable and cuttable[:end])]
    return _sample(prefix, chunks, list(token_ids[:end]))


def next_paragraph(
    token_ids: Sequence[int],
    context: int,
    k: int,
    tokenizer: PreTrainedTokenizerBase,
    prefix: list[int],
    expanded: Collection[int] = (),
    cuttable: Sequence[bool] | None = None,
) -> Sample:
    """Return a continuation sample: write the tokens after ``context`` tokens, given as chunks (REFRAG, 3.1).

    The context ends with a whole character, a few tokens earlier if necessary; the output always has the same length.
    """
    output = len(token_ids) - context
    # Cut a character that has more tokens than the window: the output needs at least one token.
    end = context if cuttable is None else min(end_of_chunk(cuttable, 0, context), len(token_ids) - 1)
    chunks: list[Span] = [(0, chunk) for chunk in chunks_of(token_ids[:end], k, tokenizer, cuttable and cuttable[:end])]
    return _sample(prefix, chunks, list(token_ids[end : end + output]), expanded)


def random_picks(chunks: int, expand: float, seed: int, index: int) -> frozenset[int]:
    """Pick a fraction ``expand`` of the chunks at random, rounded; ``seed`` and ``index`` determine which."""
    return frozenset(random.Random(f"{seed}/{index}").sample(range(chunks), round(expand * chunks)))


def reconstruction_sampler(
    windows_of: Callable[[int], Windows],
    schedule: Callable[[int], int],
    k: int,
    tokenizer: PreTrainedTokenizerBase,
    prefix: list[int],
    *,
    seed: int,
) -> Sampler:
    """Return the sampler of the reconstruction stage.

    Parameters
    ----------
    windows_of : callable
        Number of tokens -> windows of that length.
    schedule : callable
        A sample's index -> its number of chunks, from ``training.schedules``.
    k : int
    tokenizer : PreTrainedTokenizerBase
        The decoder's.
    prefix : list of int
        The result of ``prefix_ids``.
    seed : int
    """

    def sample(index: int) -> Sample:
        tokens, cuttable = windows_of(schedule(index) * k).draw(seed, index)
        return reconstruction(tokens, k, tokenizer, prefix, cuttable)

    return sample


def next_paragraph_sampler(
    windows_of: Callable[[int], Windows],
    schedule: Callable[[int], int],
    k: int,
    tokenizer: PreTrainedTokenizerBase,
    prefix: list[int],
    *,
    seed: int,
    output_tokens: int,
    expand: float = 0.0,
) -> Sampler:
    """Return the sampler of continual pre-training.

    Parameters
    ----------
    windows_of, schedule, k, tokenizer, prefix, seed
        See ``reconstruction_sampler``.
    output_tokens : int
        o, the number of tokens to write.
    expand : float
        p, the fraction of chunks to expand to text, drawn at random (REFRAG, A.1: 0.1 before the policy is trained).
    """

    def sample(index: int) -> Sample:
        context = schedule(index) * k
        tokens, cuttable = windows_of(context + output_tokens).draw(seed, index)
        drawn = next_paragraph(tokens, context, k, tokenizer, prefix, cuttable=cuttable)
        return dataclasses.replace(drawn, expanded=random_picks(drawn.num_chunks, expand, seed, index))

    return sample


def answer_sampler(
    questions: Sequence[Mapping[str, Any]], processor: RefragProcessor, *, seed: int, expand: float = 0.0
) -> Sampler:
    """Return the sampler of fine-tuning: question and retrieved passages, then the answer (REFRAG, 3.1).

    Parameters
    ----------
    questions : sequence of dicts
        "question", "passages" (a list of strings) and "answer".
    processor : RefragProcessor
        Formats the prompt, passages then question, with the decoder's chat template if it has one.
    seed : int
        Seed of the order, which is a new permutation in every epoch.
    expand : float
        Fraction of chunks to expand to text, drawn at random.

    Raises
    ------
    ValueError
        If there are no questions, or a question lacks a field.
    """
    if not questions:
        raise ValueError("questions: got none, needs one or more")
    for number, entry in enumerate(questions):
        if missing := [name for name in ("question", "passages", "answer") if not entry.get(name)]:
            raise ValueError(f"questions: number {number} has no {', '.join(missing)}")
    tokenizer = processor.tokenizer
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    @functools.lru_cache(maxsize=2)  # a step may span two epochs
    def order(epoch: int) -> list[int]:
        return random.Random(f"{seed}/{epoch}").sample(range(len(questions)), len(questions))

    def sample(index: int) -> Sample:
        epoch, place = divmod(index, len(questions))
        entry = questions[order(epoch)[place]]
        parts: list[str | Passage] = []
        for text in entry["passages"]:
            parts += [Passage(text), "\n\n"]
        parts.append(entry["question"])
        if tokenizer.chat_template:
            parts = processor.apply_chat_template([{"role": "user", "content": parts}])
        spans = processor.spans(parts)
        answer = tokenizer(entry["answer"], add_special_tokens=False)["input_ids"] + end
        chunks = sum(isinstance(span, Chunk) for _, span in spans)
        return Sample((*spans, (-1, answer)), len(spans), random_picks(chunks, expand, seed, index))

    return sample


def collate(
    samples: Sequence[Sample],
    encoder_tokenizer: PreTrainedTokenizerBase,
    *,
    position_ids: str,
    special_tokens: bool,
    latents: int = 1,
    encoder_window: int = 0,
) -> tuple[MixedPrompt, torch.Tensor]:
    """Pack samples into one prompt with labels.

    Returns
    -------
    prompt : MixedPrompt
    labels : Tensor, int64 [T]
        Labels for ``RefragForCausalLM.forward``: -100 outside the targets.
    """
    expanded, first = set(), 0
    for sample in samples:
        expanded |= {first + chunk for chunk in sample.expanded}
        first += sample.num_chunks
    prompt = pack_spans(
        [sample.spans for sample in samples],
        expanded,
        encoder_tokenizer,
        position_ids=position_ids,
        encoder_special_tokens=special_tokens,
        latents=latents,
        encoder_window=encoder_window,
    )
    counted = [index == sample.target for sample in samples for index in range(len(sample.spans))]
    lengths = prompt.layout.chunk_offsets.diff().long()
    is_target = torch.tensor(counted, device=lengths.device).repeat_interleave(lengths)
    return prompt, prompt.token_ids.masked_fill(~is_target, -100)


def collate_for(parts: ModelBundle, samples: Sequence[Sample]) -> tuple[MixedPrompt, torch.Tensor]:
    """Pack samples with the settings of a model's configuration; see ``collate``."""
    config = parts.model.config
    return collate(
        samples,
        parts.encoder_tokenizer,
        position_ids=config.position_ids,
        special_tokens=config.encoder_special_tokens,
        latents=config.latents,
        encoder_window=config.window,
    )


def _sample(prefix: list[int], chunks: list[Span], target: list[int], expanded: Collection[int] = ()) -> Sample:
    before: list[Span] = [(-1, prefix)] if prefix else []
    spans = (*before, *chunks, (-1, target))
    return Sample(spans, len(spans) - 1, frozenset(expanded))
