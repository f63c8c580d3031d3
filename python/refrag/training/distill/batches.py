"""The batches of distillation: fixed shapes, drawn from token files, prepared ahead by a thread."""

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


class TokenWindows:
    """Runs of tokens inside documents, each as likely as any other.

    Parameters
    ----------
    tokens : ndarray, uint16 [N]
    offsets : ndarray, int64 [D + 1]
        Where each document starts.
    name : str
        Of the files, for errors.
    """

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray, name: str) -> None:
        self.tokens, self.offsets, self.name = tokens, np.asarray(offsets, dtype=np.int64), name

    @functools.cache  # noqa: B019  # lives as long as the run does
    def _first_of_document(self, length: int) -> np.ndarray:
        counts = np.maximum(np.diff(self.offsets) - length + 1, 0)
        if not counts.any():
            longest = int(np.diff(self.offsets).max(initial=0))
            raise ValueError(f"{self.name}: the longest document has {longest} tokens, needs {length} for one sample")
        return np.concatenate([[0], np.cumsum(counts)])

    def draw(self, generator: np.random.Generator, count: int, length: int) -> np.ndarray:
        """Return ``count`` runs at random: int32 [count, length].

        Raises
        ------
        ValueError
            If no document is that long.
        """
        first = self._first_of_document(length)
        picks = generator.integers(first[-1], size=count)
        document = np.searchsorted(first, picks, side="right") - 1
        starts = self.offsets[document] + picks - first[document]
        return self.tokens[starts[:, None] + np.arange(length)].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Shape:
    """How many samples of which lengths a batch has. Batches of one shape share their plans and row numbers.

    Attributes
    ----------
    k, context, output : int
        Tokens of a chunk, a context, a continuation.
    continuations : int
        Samples that write what follows their context.
    expanded : int
        Chunks of each of them that stand as text.
    reconstructions, chunks : int
        Samples that write their context again, and its chunks.
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
        """Slots of a continuation."""
        return self.context // self.k - self.expanded

    @property
    def continuation_rows(self) -> int:
        """Rows of a continuation: the first token, slots and expanded chunks, the output."""
        return 1 + self.slots + self.expanded * self.k + self.output

    @property
    def reconstruction_rows(self) -> int:
        """Rows of a reconstruction: the first token, slots, the task's token, the chunks' tokens."""
        return 1 + self.chunks + 1 + self.chunks * self.k

    @property
    def text_tokens(self) -> int:
        """Tokens of text that a batch is made of."""
        whole = self.continuations * (self.context + self.output)
        return whole + self.reconstructions * self.chunks * self.k


def step_shape(options: DistillOptions, context: int, chunks: int, reconstruction: float) -> Shape:
    """Return the shape of a step: a share of the context tokens is written again, the others are continued."""
    chunks = min(chunks, context // options.k)
    samples = options.step_tokens / (context + (1 - reconstruction) * options.output_tokens)
    continuations = max(1, round((1 - reconstruction) * samples))
    reconstructions = round(reconstruction * samples * context / (chunks * options.k))
    expanded = min(round(options.expanded * context / options.k), context // options.k - 1)
    return Shape(options.k, context, options.output_tokens, continuations, expanded,
                 max(1, reconstructions) if reconstruction else 0, chunks)  # fmt: skip


class Rows:
    """What batches of a shape have in common, on a device: attention plans, positions and row numbers.

    Attributes
    ----------
    encoder, teacher, student : Packed
    teacher_outputs, student_outputs : Tensor, int64
        Rows that predict a target: continuations first.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        each, again = shape.continuations, shape.reconstructions
        self.encoder = Packed.of(
            [(each, shape.context), (again, shape.chunks * shape.k)], device, causal=False
        )  # fmt: skip
        self.teacher = Packed.of([(each, 1 + shape.context + shape.output)], device)
        self.student = Packed.of([(each, shape.continuation_rows), (again, shape.reconstruction_rows)], device)
        written = np.arange(-shape.output - 1, -1)
        of_teacher = np.arange(1, each + 1)[:, None] * (1 + shape.context + shape.output) + written
        of_student = np.arange(1, each + 1)[:, None] * shape.continuation_rows + written
        first = each * shape.continuation_rows
        ends = first + np.arange(1, again + 1)[:, None] * shape.reconstruction_rows
        rewritten = ends + np.arange(-shape.chunks * shape.k - 1, -1)
        self.teacher_outputs = torch.from_numpy(of_teacher.ravel()).to(device)
        self.student_outputs = torch.from_numpy(np.concatenate([of_student.ravel(), rewritten.ravel()])).to(device)


@dataclasses.dataclass(frozen=True)
class Packed:
    """Sequences packed one after another: their attention plans and positions [1, T]."""

    plans: GroupedPlans
    positions: torch.Tensor

    @classmethod
    def of(cls, groups: list[tuple[int, int]], device: torch.device, *, causal: bool = True) -> Packed:
        """Pack groups of sequences, (number, rows of each)."""
        positions = np.concatenate([np.tile(np.arange(rows), count) for count, rows in groups])
        plans = GroupedPlans(groups, device, causal=causal)
        return cls(plans, torch.from_numpy(positions).to(device)[None])


@dataclasses.dataclass(frozen=True)
class Batch:
    """One step's tokens, on the device.

    Attributes
    ----------
    encoder_ids, teacher_ids, student_ids : Tensor, int64
        Tokens of packed rows; 0 in the student's slots.
    slot_rows, slot_chunks : Tensor, int64 [n]
        Rows of the student that are slots, and the encoded chunk that stands in each.
    targets : Tensor, int64
        Token after each of the shape's ``student_outputs``.
    """

    shape: Shape
    encoder_ids: torch.Tensor
    teacher_ids: torch.Tensor
    student_ids: torch.Tensor
    slot_rows: torch.Tensor
    slot_chunks: torch.Tensor
    targets: torch.Tensor


def make_batch(
    shape: Shape,
    continued: np.ndarray,
    rewritten: np.ndarray,
    picks: np.ndarray,
    first_token: int,
    task_token: int,
    device: torch.device,
) -> Batch:
    """Lay out a batch.

    Parameters
    ----------
    shape : Shape
    continued : ndarray [continuations, context + output]
    rewritten : ndarray [reconstructions, chunks * k]
    picks : ndarray, bool [continuations, context / k]
        Chunks that stand as text, as many in each row.
    first_token, task_token : int
        What stands before everything, and before a reconstruction.
    device : torch.device
        Where it goes, in one copy that doesn't wait.
    """
    k, each, again, s = shape.k, shape.continuations, shape.reconstructions, shape.context
    per = s // k
    lengths = np.where(picks, k, 1)
    starts = np.cumsum(lengths, 1) - lengths + 1  # behind the first token
    student = np.zeros((each, shape.continuation_rows), np.int32)
    student[:, 0] = first_token
    student[:, -shape.output :] = continued[:, s:]
    sample, chunk = np.nonzero(picks)
    if len(sample):
        places = starts[sample, chunk][:, None] + np.arange(k)
        student[sample[:, None], places] = continued[:, :s].reshape(each, per, k)[sample, chunk]
    sample, chunk = np.nonzero(~picks)
    slot_rows = sample * shape.continuation_rows + starts[sample, chunk]
    slot_chunks = sample * per + chunk
    again_rows = np.zeros((again, shape.reconstruction_rows), np.int32)
    again_rows[:, 0] = first_token
    again_rows[:, 1 + shape.chunks] = task_token
    again_rows[:, 2 + shape.chunks :] = rewritten
    numbers = np.arange(again * shape.chunks)
    begins = each * shape.continuation_rows + np.arange(again)[:, None] * shape.reconstruction_rows + 1
    parts = {
        "encoder_ids": np.concatenate([continued[:, :s].ravel(), rewritten.ravel()]),
        "teacher_ids": np.concatenate([np.full((each, 1), first_token, np.int32), continued], 1).ravel(),
        "student_ids": np.concatenate([student.ravel(), again_rows.ravel()]),
        "slot_rows": np.concatenate([slot_rows, (begins + np.arange(shape.chunks)).ravel()]),
        "slot_chunks": np.concatenate([slot_chunks, each * per + numbers]),
        "targets": np.concatenate([continued[:, s:].ravel(), rewritten.ravel()]),
    }
    whole = torch.from_numpy(np.concatenate([part.astype(np.int64) for part in parts.values()]))
    if device.type == "cuda":
        whole = whole.pin_memory().to(device, non_blocking=True)
    pieces = whole.split([len(part) for part in parts.values()])
    return Batch(shape, *pieces)


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
    """Return the batch of step ``index``, which it and ``progress`` determine."""
    generator = np.random.default_rng([options.seed, index])
    if shape is None:
        context = options.contexts[generator.integers(len(options.contexts))]
        chunks = options.reconstruction_chunks[generator.integers(len(options.reconstruction_chunks))]
        shape = step_shape(options, context, chunks, reconstruction_share(options, progress))
    continued = windows.draw(generator, shape.continuations, shape.context + shape.output)
    rewritten = windows.draw(generator, shape.reconstructions, shape.chunks * shape.k)
    order = generator.random((shape.continuations, shape.context // shape.k)).argsort(1)
    return make_batch(
        shape, continued, rewritten, order < shape.expanded, first_token, options.reconstruction_token, device
    )


def reconstruction_share(options: DistillOptions, progress: float) -> float:
    """Return the share of reconstruction: it falls in three steps over the first third of a run."""
    level = min(3, int(progress * 9)) / 3
    return options.first_reconstruction + level * (options.reconstruction - options.first_reconstruction)


def all_shapes(options: DistillOptions) -> list[Shape]:
    """Return every shape that a run's steps may have."""
    shares = [reconstruction_share(options, level / 9) for level in range(4)]
    every = itertools.product(options.contexts, options.reconstruction_chunks, shares)
    return list(dict.fromkeys(step_shape(options, *one) for one in every))


class Prefetcher:
    """Makes batches in a thread, a few ahead.

    Parameters
    ----------
    make : callable
        A step's number -> its batch.
    first : int
        The first step's number.
    ahead : int
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
            try:  # it may be waiting for room
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
            except BaseException as error:  # handed to the loop, which raises it
                made = error
            self._queue.put(made)
            if isinstance(made, BaseException):
                return
