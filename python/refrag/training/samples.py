"""What the model is trained on: spans of text and chunks, and which of them it learns to write."""

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

Sampler = Callable[[int], "Sample"]  # a sample's number -> the sample, always the same


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sequence.

    Attributes
    ----------
    spans : tuple of Span
        Text and chunks, in order.
    target : int
        The span that the model learns to write: text, after what it is written from.
    expanded : frozenset of int
        Which of its chunks stand as text.
    latents : int
        Slots of a compressed chunk.
    """

    spans: tuple[Span, ...]
    target: int
    expanded: frozenset[int] = frozenset()
    latents: int = 1

    @property
    def num_chunks(self) -> int:
        """Chunks, expanded or not."""
        return sum(isinstance(span, Chunk) for _, span in self.spans)

    @property
    def num_targets(self) -> int:
        """Tokens that the loss is over."""
        return len(self.spans[self.target][1])  # type: ignore[arg-type]

    @property
    def num_rows(self) -> int:
        """Rows that the decoder reads."""
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
    """Cut tokens into chunks of k, the last perhaps shorter, as ``FixedChunks`` cuts the text that they stand for.

    Parameters
    ----------
    token_ids : sequence of int
        They begin with a whole character.
    k : int
    tokenizer : PreTrainedTokenizerBase
        The decoder's.
    cuttable : sequence of bool, optional
        For each token, whether a chunk may end with it; without it any may.
    """
    places = [True] * len(token_ids) if cuttable is None else cuttable
    pieces: list[tuple[int, ...]] = []
    first = 0
    while first < len(token_ids):
        end = end_of_chunk(places, first, k)
        pieces.append(tuple(token_ids[first:end]))
        first = end
    # Behind the chunk before it: a decoder that takes the first space for its own would leave it out.
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
    """Return the first task: write x_1:s from its own s/k chunks (REFRAG, 3.1), up to its last whole character."""
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
    """Return the second: write the tokens that follow ``context`` tokens, which stand as chunks (REFRAG, 3.1).

    The context ends with a whole character, a few tokens earlier if need be; as many tokens follow it all the same.
    """
    output = len(token_ids) - context
    # A character of more tokens than the window is cut nevertheless: something has to follow.
    end = context if cuttable is None else min(end_of_chunk(cuttable, 0, context), len(token_ids) - 1)
    chunks: list[Span] = [(0, chunk) for chunk in chunks_of(token_ids[:end], k, tokenizer, cuttable and cuttable[:end])]
    return _sample(prefix, chunks, list(token_ids[end : end + output]), expanded)


def random_picks(chunks: int, share: float, seed: int, index: int) -> frozenset[int]:
    """Return a share of the chunks at random, rounded; ``seed`` and ``index`` fix which."""
    return frozenset(random.Random(f"{seed}/{index}").sample(range(chunks), round(share * chunks)))


def reconstruction_sampler(
    windows_of: Callable[[int], Windows],
    schedule: Callable[[int], int],
    k: int,
    tokenizer: PreTrainedTokenizerBase,
    prefix: list[int],
    *,
    seed: int,
) -> Sampler:
    """Return the samples of the reconstruction stage.

    Parameters
    ----------
    windows_of : callable
        Tokens -> the runs of so many tokens.
    schedule : callable
        A sample's number -> its chunks, by the curriculum or without one.
    k : int
    tokenizer : PreTrainedTokenizerBase
        The decoder's.
    prefix : list of int
        From ``prefix_ids``.
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
    """Return the samples of continual pre-training; the parameters are those of ``reconstruction_sampler``, and

    Parameters
    ----------
    output_tokens : int
        o, the tokens to write.
    expand : float
        p, the share of the chunks that stand as text, drawn at random (REFRAG, A.1: 0.1 before the policy's training).
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
    """Return the samples of fine-tuning: question and retrieved passages, then the answer (REFRAG, 3.1).

    Parameters
    ----------
    questions : sequence of dicts
        "question", "passages" (a list of strings) and "answer".
    processor : RefragProcessor
        Writes the prompt in the decoder's chat template where it has one: passages, then the question.
    seed : int
        Of the order; all are seen before one is seen again.
    expand : float
        Share of the chunks that stand as text, drawn at random.

    Raises
    ------
    ValueError
        If there are no questions, or one lacks a part.
    """
    if not questions:
        raise ValueError("questions: got none, needs one or more")
    for number, entry in enumerate(questions):
        if missing := [name for name in ("question", "passages", "answer") if not entry.get(name)]:
            raise ValueError(f"questions: number {number} has no {', '.join(missing)}")
    tokenizer = processor.tokenizer
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    @functools.lru_cache(maxsize=2)  # an evaluation may read another epoch's in between
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
    """Pack samples.

    Returns
    -------
    prompt : MixedPrompt
    labels : Tensor, int64 [T]
        As ``RefragForCausalLM.forward`` takes them: -100 everywhere but in the targets.
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
    is_target = torch.tensor(counted).repeat_interleave(lengths)
    return prompt, prompt.token_ids.masked_fill(~is_target, -100)


def collate_for(parts: ModelBundle, samples: Sequence[Sample]) -> tuple[MixedPrompt, torch.Tensor]:
    """Pack samples as a model's configuration wants them; see ``collate``."""
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
