"""Distillation batches of fixed shapes, drawn from token files and prefetched by a thread."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from refrag.training.distill.attention import GroupedPlans
from refrag.training.distill.options import DistillOptions


@dataclasses.dataclass(frozen=True)
class Windows:
    """Runs of tokens, each cut into chunks, and the tokens that follow them.

    Attributes
    ----------
    tokens : ndarray, int32 [n, chunks * k + after]
        The chunks' tokens, the tokens after them, and zeros as padding if chunks have fewer than k tokens.
    lengths : ndarray, int64 [n, chunks]
        Tokens of each chunk: k, or fewer where k would cut a character.
    """

    tokens: np.ndarray
    lengths: np.ndarray

    @property
    def contexts(self) -> np.ndarray:
        """Number of tokens in all chunks of each run: int64 [n]."""
        return self.lengths.sum(1)

    @classmethod
    def whole(cls, tokens: np.ndarray, chunks: int, k: int) -> Windows:
        """Return runs whose chunks have k tokens each."""
        return cls(tokens, np.full((len(tokens), chunks), k))

    def part(self, rows: Any) -> Windows:
        """Select some of the runs."""
        return Windows(self.tokens[rows], self.lengths[rows])


class TokenWindows:
    """Draws runs of tokens within documents, each with the same probability.

    A run that would begin inside a character begins with that character's first token instead.

    Parameters
    ----------
    tokens : ndarray, uint16 [N]
    offsets : ndarray, int64 [D + 1]
        Where each document starts.
    name : str
        Name of the files in error messages.
    inside : ndarray, bool [65536], optional
        For each token, whether it begins inside a character: from ``tokens_inside_characters``. By default none does.
    """

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray, name: str, inside: np.ndarray | None = None) -> None:
        self.tokens, self.offsets, self.name = tokens, np.asarray(offsets, dtype=np.int64), name
        self.inside = np.zeros(1 << 16, bool) if inside is None else inside
        self._begins = np.append(~self.inside[tokens], True)
        self._begins[self.offsets] = True  # a document always begins a run, even if it was cut inside a character
        self._longest, run = 1, ~self._begins
        while run.any():
            self._longest, run = self._longest + 1, run[1:] & ~self._begins[: len(run) - 1]

    @functools.cache  # noqa: B019  # lives as long as the run does
    def _first_of_document(self, length: int) -> np.ndarray:
        counts = np.maximum(np.diff(self.offsets) - length + 1, 0)
        if not counts.any():
            longest = int(np.diff(self.offsets).max(initial=0))
            raise ValueError(f"{self.name}: the longest document has {longest} tokens, needs {length} for one sample")
        return np.concatenate([[0], np.cumsum(counts)])

    def draw(self, generator: np.random.Generator, count: int, chunks: int, k: int, after: int = 0) -> Windows:
        """Draw ``count`` random runs: chunks of k tokens, cut as ``FixedChunks`` does, and ``after`` more tokens.

        Raises
        ------
        ValueError
            If no document is long enough, or a character has more than k tokens.
        """
        if self._longest > k:
            raise ValueError(
                f"k: got {k}, needs {self._longest} or more: {self.name} has a character of that many tokens"
            )
        first = self._first_of_document(chunks * k + after)
        picks = generator.integers(first[-1], size=count)
        document = np.searchsorted(first, picks, side="right") - 1
        starts = self._back(self.offsets[document] + picks - first[document])
        ends = starts[:, None] + k * np.arange(1, chunks + 1)
        uneven = ~self._begins[ends].all(1)
        whole = count - int(uneven.sum())
        if whole < count:
            ends[uneven] = self._ends(starts[uneven], chunks, k)
            last = uneven.argsort(kind="stable")  # GroupedPlans expects padded runs last
            starts, ends = starts[last], ends[last]
        places = np.arange(chunks * k + after)
        tokens = self.tokens[starts[:, None] + places].astype(np.int32)
        tokens[whole:][places >= ends[whole:, -1:] + after - starts[whole:, None]] = 0
        return Windows(tokens, np.diff(ends, axis=1, prepend=starts[:, None]))

    def _back(self, places: np.ndarray) -> np.ndarray:
        """Move places inside a character back to where it begins."""
        while not (begins := self._begins[places]).all():
            places = places - ~begins
        return places

    def _ends(self, starts: np.ndarray, chunks: int, k: int) -> np.ndarray:
        """Return where each chunk ends, at most k tokens after the previous one."""
        ends = np.empty((len(starts), chunks), np.int64)
        for chunk in range(chunks):
            ends[:, chunk] = starts = self._back(starts + k)
        return ends


@dataclasses.dataclass(frozen=True)
class Shape:
    """The number of samples in a batch and their lengths. Batches of the same shape share plans and row numbers.

    Attributes
    ----------
    k, context, output : int
        Tokens per chunk, context and continuation.
    continuations : int
        Number of samples that continue their context.
    expanded : int
        Chunks per continuation that are left as text.
    reconstructions, chunks : int
        Number of samples that reconstruct their context, and chunks per sample.
    """

    k: int
    context: int
    output: int
    continuations: int
    expanded: int
    reconstructions: int
    chunks: int

    @property
    def slots(self) -> int:
        """Slots per continuation."""
        return self.context // self.k - self.expanded

    @property
    def continuation_rows(self) -> int:
        """Rows per continuation: the first token, slots and expanded chunks, the output."""
        return 1 + self.slots + self.expanded * self.k + self.output

    @property
    def reconstruction_rows(self) -> int:
        """Rows per reconstruction: the first token, slots, the task's token, the chunks' tokens."""
        return 1 + self.chunks + 1 + self.chunks * self.k


def step_shape(options: DistillOptions, context: int, chunks: int, reconstruction: float) -> Shape:
    """Return a step's shape, in which ``reconstruction`` is the fraction of context tokens that are reconstructed."""
    chunks = min(chunks, context // options.k)
    samples = options.step_tokens / (context + (1 - reconstruction) * options.output_tokens)
    continuations = max(1, round((1 - reconstruction) * samples))
    reconstructions = round(reconstruction * samples * context / (chunks * options.k))
    expanded = min(round(options.expanded * context / options.k), context // options.k - 1)
    return Shape(options.k, context, options.output_tokens, continuations, expanded,
                 max(1, reconstructions) if reconstruction else 0, chunks)  # fmt: skip


class Rows:
    """The attention plans and positions that batches of the same shape share, on a device.

    Attributes
    ----------
    encoder, teacher, student : Packed
        Rows for runs whose chunks all have k tokens. For shorter chunks, the causal teacher and student can use them
        as well, since no row attends to the padding after it; such a batch has plans of its own for the encoder.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        continued, rewritten = shape.continuations, shape.reconstructions
        self.encoder = Packed.of(
            [(continued, shape.context), (rewritten, shape.chunks * shape.k)], device, causal=False
        )  # fmt: skip
        self.teacher = Packed.of([(continued, 1 + shape.context + shape.output)], device)
        self.student = Packed.of(
            [(continued, shape.continuation_rows), (rewritten, shape.reconstruction_rows)], device
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Packed:
    """Sequences packed one after another: their attention plans and positions [1, T]."""

    plans: GroupedPlans
    positions: torch.Tensor

    @classmethod
    def of(
        cls,
        groups: list[tuple[int, int]],
        device: torch.device,
        *,
        causal: bool = True,
        used: np.ndarray | None = None,
    ) -> Packed:
        """Pack groups of (number of sequences, rows per sequence); ``used`` counts each one's rows before padding."""
        positions = np.concatenate([np.tile(np.arange(rows), count) for count, rows in groups])
        plans = GroupedPlans(groups, device, causal=causal, used=used)
        return cls(plans, torch.from_numpy(positions).to(device)[None])


@dataclasses.dataclass(frozen=True)
class Batch:
    """One step's tokens, on the device.

    Attributes
    ----------
    encoder_ids, teacher_ids, student_ids : Tensor, int64
        Tokens of packed rows; 0 in the student's slots and in padding.
    slot_rows, slot_chunks : Tensor, int64 [n]
        Rows of the student that are slots, and the encoded chunk for each.
    teacher_outputs, student_outputs : Tensor, int64
        Rows that predict a target: continuations first.
    targets : Tensor, int64
        Token after each of ``student_outputs``.
    chunk_starts, chunk_lengths : Tensor, int64 [N]
        First encoder row of each chunk, and its number of rows.
    encoder : Packed, optional
        The encoder's plans and positions if a chunk has fewer than k tokens; None means the shape's ``Rows.encoder``.
    text_tokens : int
        Number of text tokens in the batch: contexts, reconstructed chunks and outputs.
    """

    shape: Shape
    encoder_ids: torch.Tensor
    teacher_ids: torch.Tensor
    student_ids: torch.Tensor
    slot_rows: torch.Tensor
    slot_chunks: torch.Tensor
    teacher_outputs: torch.Tensor
    student_outputs: torch.Tensor
    targets: torch.Tensor
    chunk_starts: torch.Tensor
    chunk_lengths: torch.Tensor
    encoder: Packed | None
    text_tokens: int


def make_batch(
    shape: Shape,
    continued: Windows,
    rewritten: Windows,
    picks: np.ndarray,
    first_token: int,
    task_token: int,
    device: torch.device,
) -> Batch:
    """Assemble a batch.

    Parameters
    ----------
    shape : Shape
    continued : Windows
        One run per continuation: the context's chunks, then the output.
    rewritten : Windows
        One run per reconstruction: its chunks, with nothing after them.
    picks : ndarray, bool [continuations, context / k]
        Chunks that are left as text, equally many in each row.
    first_token, task_token : int
        Token that begins every sequence, and token that precedes a reconstruction.
    device : torch.device
        Device to copy the batch to, in one non-blocking copy.
    """
    k, s, o = shape.k, shape.context, shape.output
    num_continued, num_rewritten = shape.continuations, shape.reconstructions
    per, contexts, within = s // k, continued.contexts, np.arange(k)
    outputs = np.take_along_axis(continued.tokens, contexts[:, None] + np.arange(o), 1)
    lengths = np.where(picks, continued.lengths, 1)
    starts = np.cumsum(lengths, 1) - lengths + 1  # after the first token
    begins = np.cumsum(continued.lengths, 1) - continued.lengths
    student = np.zeros((num_continued, shape.continuation_rows), np.int32)
    student[:, 0] = first_token
    written = 1 + lengths.sum(1)[:, None] + np.arange(o)
    np.put_along_axis(student, written, outputs, 1)
    sample, chunk = np.nonzero(picks)
    own, place = np.nonzero(within < continued.lengths[sample, chunk][:, None])
    sample, chunk = sample[own], chunk[own]
    student[sample, starts[sample, chunk] + place] = continued.tokens[sample, begins[sample, chunk] + place]
    sample, chunk = np.nonzero(~picks)
    rewritten_rows = np.zeros((num_rewritten, shape.reconstruction_rows), np.int32)
    rewritten_rows[:, 0] = first_token
    rewritten_rows[:, 1 + shape.chunks] = task_token
    rewritten_rows[:, 2 + shape.chunks :] = rewritten.tokens
    real = np.arange(shape.chunks * k) < rewritten.contexts[:, None]
    rewritten_start = (
        num_continued * shape.continuation_rows + np.arange(num_rewritten)[:, None] * shape.reconstruction_rows
    )
    teacher_rows = 1 + s + o
    rewritten_begins = np.cumsum(rewritten.lengths, 1) - rewritten.lengths
    pieces = {
        "encoder_ids": [np.where(np.arange(s) < contexts[:, None], continued.tokens[:, :s], 0), rewritten.tokens],
        "teacher_ids": [np.concatenate([np.full((num_continued, 1), first_token, np.int32), continued.tokens], 1)],
        "student_ids": [student, rewritten_rows],
        "slot_rows": [sample * shape.continuation_rows + starts[sample, chunk],
                      rewritten_start + 1 + np.arange(shape.chunks)],
        "slot_chunks": [sample * per + chunk, num_continued * per + np.arange(num_rewritten * shape.chunks)],
        "teacher_outputs": [np.arange(num_continued)[:, None] * teacher_rows + contexts[:, None] + np.arange(o)],
        "student_outputs": [np.arange(num_continued)[:, None] * shape.continuation_rows + written - 1,
                            (rewritten_start + 1 + shape.chunks + np.arange(shape.chunks * k))[real]],
        "targets": [outputs, rewritten.tokens[real]],
        "chunk_starts": [np.arange(num_continued)[:, None] * s + begins,
                         num_continued * s + np.arange(num_rewritten)[:, None] * shape.chunks * k + rewritten_begins],
        "chunk_lengths": [continued.lengths, rewritten.lengths],
    }  # fmt: skip
    parts = [np.concatenate([piece.ravel() for piece in own]).astype(np.int64) for own in pieces.values()]
    whole = torch.from_numpy(np.concatenate(parts))
    if device.type == "cuda":
        whole = whole.pin_memory().to(device, non_blocking=True)
    used, encoder = np.concatenate([contexts, rewritten.contexts]), None
    if (continued.lengths < k).any() or (rewritten.lengths < k).any():
        groups = [(num_continued, s), (num_rewritten, shape.chunks * k)]
        encoder = Packed.of(groups, device, causal=False, used=used)
    tokens = int(used.sum()) + num_continued * o
    tensors = dict(zip(pieces, whole.split([len(part) for part in parts])))
    return Batch(shape, **tensors, encoder=encoder, text_tokens=tokens)


def batch_at(
    options: DistillOptions,
    windows: TokenWindows,
    index: int,
    progress: float,
    first_token: int,
    device: torch.device,
    *,
    shape: Shape | None = None,
) -> Batch:
    """Return the batch of step ``index``; the same index and progress give the same batch."""
    generator = np.random.default_rng([options.seed, index])
    if shape is None:
        context = options.contexts[generator.integers(len(options.contexts))]
        chunks = options.reconstruction_chunks[generator.integers(len(options.reconstruction_chunks))]
        shape = step_shape(options, context, chunks, reconstruction_share(options, progress))
    continued = windows.draw(generator, shape.continuations, shape.context // shape.k, shape.k, shape.output)
    rewritten = windows.draw(generator, shape.reconstructions, shape.chunks, shape.k)
    order = generator.random((shape.continuations, shape.context // shape.k)).argsort(1)
    return make_batch(
        shape, continued, rewritten, order < shape.expanded, first_token, options.reconstruction_token, device
    )


def reconstruction_share(options: DistillOptions, progress: float) -> float:
    """Return the fraction of reconstruction, which falls in three steps over the first third of a run."""
    level = min(3, int(progress * 9)) / 3
    return options.first_reconstruction + level * (options.reconstruction - options.first_reconstruction)


def all_shapes(options: DistillOptions) -> list[Shape]:
    """Return all shapes that the steps of a run may have."""
    shares = [reconstruction_share(options, level / 9) for level in range(4)]
    every = itertools.product(options.contexts, options.reconstruction_chunks, shares)
    return list(dict.fromkeys(step_shape(options, *one) for one in every))


class Prefetcher:
    """Prepares batches in a thread.

    Parameters
    ----------
    make : callable
        A step's number -> its batch.
    first : int
        The first step's number.
    ahead : int
        Maximum number of batches waiting.
    """

    def __init__(self, make: Callable[[int], Batch], first: int, *, ahead: int = 4) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(make, first), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            made = self._queue.get()
            if isinstance(made, BaseException):
                raise made
            yield made

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        while self._thread.is_alive():
            try:  # make room, because the thread may be waiting to add a batch
                self._queue.get(timeout=0.05)
            except queue.Empty:
                pass
        self._thread.join()

    def _work(self, make: Callable[[int], Batch], first: int) -> None:
        for index in itertools.count(first):
            if self._stop.is_set():
                return
            try:
                made: Any = make(index)
            except BaseException as error:  # raised again in the loop's thread
                made = error
            self._queue.put(made)
            if isinstance(made, BaseException):
                return
