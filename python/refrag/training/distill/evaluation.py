"""Evaluation during a run: the fraction of the context's value that slots keep, and how much text they reproduce."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from refrag.training.distill.batches import Batch, Packed, Shape, TokenWindows, Windows, make_batch
from refrag.training.distill.models import Distillation, hidden_of

CONTEXT, OUTPUT = 256, 64  # s and o in the paper: tokens of the context and of the output
_SEED = 20_251_127
_SAMPLES_PER_PASS = 64


class Evaluator:
    """Evaluates a run on held-out domains, always on the same samples.

    Both ends of the scale, no context and full context, are measured with the original decoder as well as the trained
    one. With the trained one alone the scale would be misleading: the decoder also learns from the text, and if it got
    worse at reading the full context, slots would seem to keep more of its value.

    Parameters
    ----------
    distillation : Distillation
    domains : mapping of str to TokenWindows
    first_token : int
    context, output : int
        s and o.
    """

    def __init__(
        self,
        distillation: Distillation,
        domains: Mapping[str, TokenWindows],
        first_token: int,
        *,
        context: int = CONTEXT,
        output: int = OUTPUT,
    ) -> None:
        self._distillation, self._domains, self._first_token = distillation, domains, first_token
        self._context, self._output = context, output
        self._base: dict[tuple[str, int], tuple[float, float]] = {}

    @torch.no_grad()
    def measure(self, samples: int, *, tuned_ends: bool = True) -> dict[str, Any]:
        """Return the figures of each domain, and their mean over the domains.

        Parameters
        ----------
        samples : int
            Samples per domain.
        tuned_ends : bool
            Whether to measure the trained decoder without compression too.

        Returns
        -------
        dict
            For each domain the losses ``compressed``, ``none`` and ``full`` in nats per token, and with ``tuned_ends``
            ``tuned_none``, ``tuned_full`` and ``tuned_last`` (the last s / k tokens as text) of the trained decoder;
            ``kept``, the fraction of the context's value that slots keep, and ``tuned_kept``; ``rebuilt`` and
            ``rebuilt_first``, the fraction of tokens, and of chunks' first tokens, that the decoder ranks first when it
            reconstructs s tokens; ``single`` and ``single_first``, the same for single chunks.
        """
        figures = {name: self._domain(name, samples, tuned_ends) for name in self._domains}
        names = next(iter(figures.values()))
        figures["mean"] = {name: float(np.mean([own[name] for own in figures.values()])) for name in names}
        return {domain: {name: round(value, 4) for name, value in own.items()} for domain, own in figures.items()}

    def _domain(self, name: str, samples: int, tuned_ends: bool) -> dict[str, float]:
        own = self._distillation
        k, s, o = own.options.k, self._context, self._output
        drawn = self._domains[name].draw(np.random.default_rng(_SEED), samples, s // k, k, o)
        student, teacher = own.model.decoder.base_model, own.teacher
        contexts, nothing = drawn.contexts, np.zeros(samples, np.int64)
        outputs = np.take_along_axis(drawn.tokens, contexts[:, None] + np.arange(o), 1)
        if (name, samples) not in self._base:
            self._base[name, samples] = (
                self._text(teacher, outputs, nothing), self._text(teacher, drawn.tokens, contexts)
            )  # fmt: skip
        none, full = self._base[name, samples]
        compressed = self._compressed(drawn)
        figures = {"compressed": compressed, "none": none, "full": full, "kept": _kept(none, compressed, full)}
        if tuned_ends:
            none, full = self._text(student, outputs, nothing), self._text(student, drawn.tokens, contexts)
            last = self._text(student, *_last(drawn, s // k, o, self._domains[name].inside))
            figures |= {
                "tuned_none": none, "tuned_full": full, "tuned_last": last, "tuned_kept": _kept(none, compressed, full),
            }  # fmt: skip
        figures["rebuilt"], figures["rebuilt_first"] = self._rebuilt(_chunks(drawn, s // k, k), s // k)
        figures["single"], figures["single_first"] = self._rebuilt(_alone(drawn, min(4, s // k), k), 1)
        return figures

    def _text(self, base: Any, tokens: np.ndarray, before: np.ndarray) -> float:
        """Return the loss of the output, which follows the first token and ``before`` tokens in each row."""
        total, output = 0.0, self._output
        for chosen in _slices(len(tokens)):
            part, own = tokens[chosen], before[chosen]
            rows = 1 + part.shape[1]
            ids = np.concatenate([np.full((len(part), 1), self._first_token), part], 1)
            hidden = hidden_of(base, self._distillation.embed(self._tensor(ids.ravel())), self._packed(len(part), rows))
            places = own[:, None] + np.arange(output)
            predicting = hidden[self._tensor((np.arange(len(part))[:, None] * rows + places).ravel())]
            targets = np.take_along_axis(part, places, 1)
            total += float(self._losses(predicting, self._tensor(targets.ravel()))[0].sum())
        return total / (len(tokens) * output)

    def _compressed(self, drawn: Windows) -> float:
        k, s, o = self._distillation.options.k, self._context, self._output
        total = 0.0
        for own in _slices(len(drawn.tokens)):
            part = drawn.part(own)
            shape = Shape(k, s, o, len(part.tokens), 0, 0, 1)
            picks = np.zeros((len(part.tokens), s // k), bool)
            losses, _ = self._read(self._batch(shape, part, Windows.whole(np.zeros((0, k), np.int32), 1, k), picks))
            total += float(losses.sum())
        return total / (len(drawn.tokens) * o)

    def _rebuilt(self, drawn: Windows, chunks: int) -> tuple[float, float]:
        """Return the fraction of tokens, and of chunks' first tokens, predicted correctly given the true prefix."""
        k = self._distillation.options.k
        nothing = Windows.whole(np.zeros((0, k + 1), np.int32), 1, k)
        hits, firsts = [], []
        for own in _slices(len(drawn.tokens)):
            part = drawn.part(own)
            shape = Shape(k, k, 1, 0, 0, len(part.tokens), chunks)
            hits.append(self._read(self._batch(shape, nothing, part, np.zeros((0, 1), bool)))[1])
            lengths = part.lengths.ravel()
            firsts.append(hits[-1][self._tensor(np.cumsum(lengths) - lengths)])
        return float(torch.cat(hits).float().mean()), float(torch.cat(firsts).float().mean())

    def _batch(self, shape: Shape, continued: Windows, rewritten: Windows, picks: np.ndarray) -> Batch:
        own = self._distillation
        task = own.options.reconstruction_token
        return make_batch(shape, continued, rewritten, picks, self._first_token, task, own.device)

    def _read(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self._distillation.student_hidden(batch)
        return self._losses(hidden, batch.targets)

    def _losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cross-entropy of each row, and whether its target is the most likely token."""
        losses, hits = [], []
        for own, wanted in zip(hidden.split(2048), targets.split(2048)):
            logits = (own @ self._distillation.head.t()).float()
            losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
            hits.append(logits.argmax(1) == wanted)
        return torch.cat(losses), torch.cat(hits)

    def _tensor(self, ids: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(ids.astype(np.int64)).to(self._distillation.device)

    def _packed(self, samples: int, rows: int) -> Packed:
        return Packed.of([(samples, rows)], self._distillation.device)


def _kept(none: float, compressed: float, full: float) -> float:
    gain = none - full
    return (none - compressed) / gain if abs(gain) > 1e-6 else 0.0


def _slices(samples: int) -> list[slice]:
    """Split the samples evenly into passes of at most ``_SAMPLES_PER_PASS``."""
    edges = np.cumsum([0, *map(len, np.array_split(np.arange(samples), -(-samples // _SAMPLES_PER_PASS)))]).tolist()
    return [slice(start, end) for start, end in zip(edges, edges[1:])]


def _chunks(drawn: Windows, chunks: int, k: int) -> Windows:
    """Return the runs without the tokens after their chunks."""
    within = np.arange(chunks * k)
    tokens = np.where(within < drawn.contexts[:, None], drawn.tokens[:, : chunks * k], 0)
    return Windows(tokens, drawn.lengths)


def _alone(drawn: Windows, chunks: int, k: int) -> Windows:
    """Return the first chunks of each run, each as a run of its own."""
    lengths = drawn.lengths[:, :chunks]
    places = (np.cumsum(lengths, 1) - lengths)[..., None] + np.arange(k)
    runs = np.arange(len(lengths))[:, None, None]
    tokens = np.where(np.arange(k) < lengths[..., None], drawn.tokens[runs, places], 0)
    return Windows(tokens.reshape(-1, k), lengths.reshape(-1, 1))


def _last(drawn: Windows, count: int, output: int, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each context's last ``count`` tokens and the output, and how many context tokens that is.

    A start inside a character moves back to the character's first token, which adds context tokens.
    """
    contexts = drawn.contexts
    starts, runs = contexts - count, np.arange(len(contexts))
    while (cut := inside[drawn.tokens[runs, starts]]).any():
        starts = starts + cut
    places = np.minimum(starts[:, None] + np.arange(count + output), drawn.tokens.shape[1] - 1)
    return np.take_along_axis(drawn.tokens, places, 1), contexts - starts


def domains_of(windows: Mapping[str, TokenWindows], context: int, k: int, output: int) -> dict[str, TokenWindows]:
    """Check that a sample can be drawn from each domain; return the domains."""
    for own in windows.values():
        own.draw(np.random.default_rng(0), 1, context // k, k, output)
    return dict(windows)
