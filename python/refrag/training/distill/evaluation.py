"""What is measured during a run: the share of the context's value that slots keep, and what can be read from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from refrag.training.distill.batches import Batch, Packed, Shape, TokenWindows, make_batch
from refrag.training.distill.models import Distillation, hidden_of

CONTEXT, OUTPUT = 256, 64  # s and o of the measured value
_SEED = 20_251_127
_AT_ONCE = 64  # samples of a pass


class Evaluator:
    """Measures a run on held-out domains, always on the same samples.

    The ends of the scale are measured with the decoder as it came, and with the decoder as it is now: one that learns
    to read slots also learns from the text, and one whose full context got worse would seem to keep more.

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
            Of each domain.
        tuned_ends : bool
            Whether to measure the decoder as it is now without compression too.

        Returns
        -------
        dict
            For each domain ``compressed``, ``none``, ``full``, ``last`` (its last s / k tokens as text) in nats a
            token, with ``tuned_`` before them those of the decoder as it is now; ``kept``, the share of the context's
            value that slots keep, and ``tuned_kept``; ``rebuilt`` and ``rebuilt_first``, the share of tokens, and of
            chunks' first tokens, that are the most likely one when s tokens are written again; ``single`` and
            ``single_first``, the same for chunks on their own.
        """
        figures = {name: self._domain(name, samples, tuned_ends) for name in self._domains}
        names = next(iter(figures.values()))
        figures["mean"] = {name: float(np.mean([own[name] for own in figures.values()])) for name in names}
        return {domain: {name: round(value, 4) for name, value in own.items()} for domain, own in figures.items()}

    def _domain(self, name: str, samples: int, tuned_ends: bool) -> dict[str, float]:
        own = self._distillation
        k, s, o = own.options.k, self._context, self._output
        drawn = self._domains[name].draw(np.random.default_rng(_SEED), samples, s + o)
        student, teacher = own.model.decoder.base_model, own.teacher
        if (name, samples) not in self._base:
            self._base[name, samples] = (self._text(teacher, drawn[:, s:], o), self._text(teacher, drawn, o))
        none, full = self._base[name, samples]
        compressed = self._compressed(drawn)
        figures = {"compressed": compressed, "none": none, "full": full, "kept": _kept(none, compressed, full)}
        if tuned_ends:
            none, full = self._text(student, drawn[:, s:], o), self._text(student, drawn, o)
            last = self._text(student, drawn[:, s - s // k :], o)
            figures |= {
                "tuned_none": none, "tuned_full": full, "tuned_last": last, "tuned_kept": _kept(none, compressed, full),
            }  # fmt: skip
        figures["rebuilt"], figures["rebuilt_first"] = self._rebuilt(drawn[:, :s], s // k)
        figures["single"], figures["single_first"] = self._rebuilt(drawn[:, : 4 * k].reshape(-1, k), 1)
        return figures

    def _text(self, base: Any, tokens: np.ndarray, output: int) -> float:
        """Return the loss of the last ``output`` tokens, behind the first token and those before them."""
        total = 0.0
        for part in np.array_split(tokens, -(-len(tokens) // _AT_ONCE)):
            rows = 1 + part.shape[1]
            ids = np.concatenate([np.full((len(part), 1), self._first_token), part], 1)
            hidden = hidden_of(base, self._distillation.embed(self._tensor(ids.ravel())), self._packed(len(part), rows))
            before = hidden.view(len(part), rows, -1)[:, -output - 1 : -1].flatten(0, 1)
            total += float(self._losses(before, self._tensor(part[:, -output:].ravel()))[0].sum())
        return total / (len(tokens) * output)

    def _compressed(self, tokens: np.ndarray) -> float:
        k, s, o = self._distillation.options.k, self._context, self._output
        total = 0.0
        for part in np.array_split(tokens, -(-len(tokens) // _AT_ONCE)):
            shape = Shape(k, s, o, len(part), 0, 0, 1)
            picks = np.zeros((len(part), s // k), bool)
            losses, _ = self._read(self._batch(shape, part, np.zeros((0, k), np.int32), picks))
            total += float(losses.sum())
        return total / (len(tokens) * o)

    def _rebuilt(self, tokens: np.ndarray, chunks: int) -> tuple[float, float]:
        """Return the share of tokens, and of chunks' first tokens, that are rebuilt given the true ones before them."""
        k = self._distillation.options.k
        hits = []
        for part in np.array_split(tokens, -(-len(tokens) // _AT_ONCE)):
            shape = Shape(k, k, 1, 0, 0, len(part), chunks)
            batch = self._batch(shape, np.zeros((0, k + 1), np.int32), part, np.zeros((0, 1), bool))
            hits.append(self._read(batch)[1].view(-1, k))
        every = torch.cat(hits).float()
        return float(every.mean()), float(every[:, 0].mean())

    def _batch(self, shape: Shape, continued: np.ndarray, rewritten: np.ndarray, picks: np.ndarray) -> Batch:
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


def domains_of(windows: Mapping[str, TokenWindows], length: int) -> dict[str, TokenWindows]:
    """Return the domains, after checking that each has a document of ``length`` tokens."""
    for own in windows.values():
        own.draw(np.random.default_rng(0), 1, length)
    return dict(windows)
