"""The distillation loop. No step waits for the device: values to log are copied asynchronously and read steps later."""

from __future__ import annotations

import collections
import dataclasses
import faulthandler
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from refrag import weights
from refrag.adapters import read_adapter
from refrag.training.config_files import write_config
from refrag.training.distill.batches import Batch, Prefetcher, Shape, TokenWindows, all_shapes, batch_at
from refrag.training.distill.checkpoint import Log, Writer, read_state
from refrag.training.distill.evaluation import CONTEXT, OUTPUT, Evaluator, domains_of
from refrag.training.distill.models import Distillation
from refrag.training.distill.optimizer import FlatAdamW, Progress, rates_at
from refrag.training.distill.options import HELD_OUT_DOMAINS, DistillOptions
from refrag.training.token_files import load_tokens, tokenizer_hash, tokens_inside_characters

_STEPS_AHEAD = 2  # how many steps the host may run ahead of the device
_WARM_UP_SECONDS = 150  # a GPU that hasn't finished its first steps by then is assumed to hang
_NAN_STEPS = 5  # consecutive steps without a finite gradient that end a run


class DistillationError(ValueError):
    """Raised if distillation can't continue; the message states the reason and which adapter was kept."""


def distill(
    options: DistillOptions, listener: Callable[[dict[str, Any]], None] = lambda entry: None
) -> list[dict[str, Any]]:
    """Train the encoder and the projector to turn chunks into slots that the decoder reads, and write the adapter.

    An interrupted run resumes from its ``state.pt`` when it is started again with the same options.

    Parameters
    ----------
    options : DistillOptions
    listener : callable
        Called with each log entry when it is written.

    Returns
    -------
    list of dict
        The log entries of this call; those from before an interruption are only in the file.

    Raises
    ------
    DistillationError
        If the gradient is not finite for several steps in a row, or the folder contains another run. The last adapter
        is kept.
    ValueError
        If the token files are unusable: documents too short, held-out domains in the training files, or tokens of
        another tokenizer.
    """
    return _Run(options, time.monotonic(), listener).run()


class _Run:
    def __init__(self, options: DistillOptions, started: float, listener: Callable[[dict[str, Any]], None]) -> None:
        self.options, self.started, self.listener = options, started, listener
        self.device = torch.device(_device(options.device))
        if options.dtype == "auto":
            self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        else:
            self.dtype = getattr(torch, options.dtype)
        copies = [] if options.pieces is None else [options.pieces / "log.jsonl"]
        self.log = Log(options.output / "log.jsonl", *copies)
        self.entries: list[dict[str, Any]] = []
        self.train, domains = read_files(options)
        folder = options.decoder or weights.decoder_folder()
        decoder = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        self._check_tokens(decoder.config.vocab_size, [self.train, *domains.values()])
        self.first_token = _first_token(decoder.config)
        self.model = Distillation(decoder, options, self.device, self.dtype)
        context = min(CONTEXT, max(options.contexts))
        output = min(OUTPUT, options.output_tokens)
        self.evaluator = Evaluator(
            self.model,
            domains_of(domains, context, options.k, output),
            self.first_token,
            context=context,
            output=output,
        )
        self.writer = Writer(self.model.model, options.output, options.pieces, options.piece_bytes)
        self.step, self.tokens = 0, 0
        self.meter = _Meter(self)
        self.progress = Progress(options.steps, None)

    def run(self) -> list[dict[str, Any]]:
        options = self.options
        state = self._resume()
        write_config(options, options.output)
        self.optimizer = FlatAdamW(self.model.trained, options.max_grad_norm, options.betas)
        if state is not None:
            self.optimizer.load(state["optimizer"])
        if self.device.type == "cuda":
            # A kernel that never returns would use up the time. Exit, so that a new process can run without the kernel.
            faulthandler.dump_traceback_later(_WARM_UP_SECONDS, exit=True)
        warm = self._warm_up()
        began = time.monotonic()
        first = self.note("evaluation", **self._evaluate(options.evaluate_samples))
        if self.device.type == "cuda":
            faulthandler.cancel_dump_traceback_later()
        measured = time.monotonic() - began
        if options.minutes is not None:
            # The final evaluation costs more than the first in proportion to its samples; 20% is a safety margin.
            last = measured * options.final_samples / options.evaluate_samples
            reserve = min(max(options.reserve_seconds, 1.2 * last), 0.3 * 60 * options.minutes)
            left = 60 * options.minutes - reserve - (time.monotonic() - self.started)
            if left <= 0:
                raise ValueError(
                    f"minutes: got {options.minutes:.3g}, needs more than {options.minutes - left / 60:.3g}: the time "
                    "that loading, compiling and measuring take here"
                )
            # A resumed run gets the time that remained when it was interrupted, if that is less.
            planned = state["seconds"] if state is not None else left
            self.progress.seconds = min(planned, self.progress.before + left)
        self.note("start", device=str(self.device), dtype=str(self.dtype), warm_up_seconds=round(warm, 2),
                   evaluation_seconds=round(measured, 2), train_seconds=self.progress.seconds,
                   trained={name: sum(p.numel() for _, p in own) for name, own in self.model.trained.items()},
                   kept=first["figures"]["mean"]["kept"])  # fmt: skip
        self._train()
        self._save()
        self.note("final", **self._evaluate(options.final_samples))
        self.writer.wait()
        self.note("end", step=self.step, tokens=self.tokens, seconds=round(time.monotonic() - self.started, 1))
        return self.entries

    def _train(self) -> None:
        options, progress = self.options, self.progress
        progress.begin()
        meter = self.meter
        meter.begin()
        batches = Prefetcher(self._batch, self.step)
        saved = evaluated = time.monotonic()
        marks: collections.deque[Any] = collections.deque()
        try:
            for batch in batches:
                at = progress.at(self.step)
                if at >= 1:
                    break
                loss, sums = self.model.loss(batch)
                loss.backward()
                rates = rates_at(options, at)
                self.optimizer.step(rates)
                self.step += 1
                self.tokens += batch.text_tokens
                meter.count(batch, sums, rates, at)
                if self.device.type == "cuda":
                    marks.append(torch.cuda.Event())
                    marks[-1].record()
                    if len(marks) > _STEPS_AHEAD:
                        marks.popleft().synchronize()
                now = time.monotonic()
                if now - saved >= options.save_seconds:
                    saved = now
                    self._save()
                if now - evaluated >= options.evaluate_seconds:
                    self.note("evaluation", **self._evaluate(options.evaluate_samples, tuned_ends=False))
                    evaluated = time.monotonic()
            meter.flush()
        finally:
            batches.close()

    def _batch(self, index: int, shape: Shape | None = None) -> Batch:
        at = self.progress.at(index)
        return batch_at(self.options, self.train, index, at, self.first_token, self.device, shape=shape)

    def _warm_up(self) -> float:
        """Run the largest step of each context length once and discard it, to compile kernels and reserve memory.

        If a step doesn't fit into memory, halve ``step_tokens`` and try again, so that the loop can't run out later.
        Return the seconds that this took.
        """
        began = time.monotonic()
        wanted = self.options.attention
        if wanted == "auto":
            wanted = "faster" if self.device.type == "cuda" else "refrag"
        self.model.use_attention("torch" if wanted == "torch" else "refrag")
        while True:
            try:
                batches = [self._batch(index, shape) for index, shape in enumerate(self._largest_shapes())]
                if self.step == 0 and self.options.start is None:
                    self.model.fit_scale(batches[0])
                if wanted == "faster":
                    self.model.use_attention(self._choose_attention(batches[0]))
                for batch in batches:
                    self._gradient(batch)
                break
            except torch.cuda.OutOfMemoryError:
                self.options = dataclasses.replace(self.options, step_tokens=self.options.step_tokens // 2)
                self.note("memory", step_tokens=self.options.step_tokens)
                torch.cuda.empty_cache()
        return time.monotonic() - began

    def _largest_shapes(self) -> list[Shape]:
        """Return the largest shape of each context length, in descending order."""
        shapes = all_shapes(self.options)
        each = [max((shape for shape in shapes if shape.context == context), key=_size)
                for context in self.options.contexts]  # fmt: skip
        return sorted(each, key=_size, reverse=True)

    def _gradient(self, batch: Batch) -> tuple[float, torch.Tensor]:
        """Return the loss of a batch and its gradient; leave the optimizer's gradients at zero."""
        loss, _ = self.model.loss(batch)
        loss.backward()
        gradient = self.optimizer.gradient()
        self.optimizer.zero_grad()
        return float(loss.detach()), gradient

    def _choose_attention(self, batch: Batch) -> str:
        """Return the attention to use: refrag_kernels' unless it fails, differs from torch's, or is slower."""
        losses, gradients, seconds, errors = {}, {}, {}, {}
        for name in ("refrag", "torch"):
            try:
                self.model.use_attention(name)
                losses[name], gradients[name] = self._gradient(batch)
                began = time.monotonic()
                for _ in range(2):
                    self._gradient(batch)
                seconds[name] = (time.monotonic() - began) / 2
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # on untested hardware, a kernel may fail in any way: use the other one
                errors[name] = f"{type(error).__name__}: {error}"[:300]
        if len(seconds) < 2:
            if not seconds:
                raise DistillationError(f"attention: neither implementation runs here: {errors}")
            taken = next(iter(seconds))
            self.note("attention", taken=taken, errors=errors)
            return taken
        similarity = float(torch.nn.functional.cosine_similarity(gradients["refrag"], gradients["torch"], 0))
        gap = abs(losses["refrag"] - losses["torch"])
        agree = similarity > 0.98 and gap < 0.02 * abs(losses["torch"])
        taken = "refrag" if agree and seconds["refrag"] <= seconds["torch"] else "torch"
        self.note("attention", taken=taken, agree=agree,
                  cosine=round(similarity, 5) if math.isfinite(similarity) else None,
                  losses={name: round(value, 5) if math.isfinite(value) else None for name, value in losses.items()},
                  seconds={name: round(value, 4) for name, value in seconds.items()})  # fmt: skip
        return taken

    def _evaluate(self, samples: int, *, tuned_ends: bool = True) -> dict[str, Any]:
        began = time.monotonic()
        figures = self.evaluator.measure(samples, tuned_ends=tuned_ends)
        return {"step": self.step, "tokens": self.tokens, "samples": samples,
                "seconds": round(time.monotonic() - began, 2), "figures": figures}  # fmt: skip

    def _save(self) -> None:
        if int(self.optimizer.in_a_row):
            return  # the weights in memory may be broken; keep the previous file
        tensors = {name: value.to("cpu", torch.bfloat16, copy=True) for name, value in self.model.state().items()}
        broken = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
        if broken:
            raise DistillationError(f"{broken[0]}: not finite at step {self.step}; {self._kept()}")
        notes = {"step": self.step, "tokens": self.tokens, "reconstruction_token": self.options.reconstruction_token}
        state = None
        if self.options.keep_state:
            state = {"signature": self.options.signature(), "step": self.step, "tokens": self.tokens,
                     "elapsed": self.progress.elapsed, "seconds": self.progress.seconds, "meter": self.meter.state(),
                     "scale": self.model.model.projector.down.weight.detach().cpu().clone(),
                     "optimizer": self.optimizer.state()}  # fmt: skip
        self.writer.write(tensors, notes, state)

    def _resume(self) -> dict[str, Any] | None:
        options = self.options
        state = read_state(options.output)
        if state is None:
            (options.output / "log.jsonl").unlink(missing_ok=True)
            if options.start is not None:
                self.model.load(read_adapter(options.start)[1])
            return None
        own = options.signature()
        for name, value in state["signature"].items():
            if own[name] != value:
                raise DistillationError(
                    f"{options.output}: contains a run with {name} = {value}, this one has {own[name]}; "
                    "use another folder, or the same options"
                )
        self.step, self.tokens = state["step"], state["tokens"]
        self.progress.before = state["elapsed"]
        if "meter" in state:  # not in states of earlier versions
            self.meter.load(state["meter"])
        with torch.no_grad():
            self.model.model.projector.down.weight.copy_(state["scale"])
        return state

    def note(self, kind: str, **values: Any) -> dict[str, Any]:
        entry = self.log.add(kind=kind, time=round(time.monotonic() - self.started, 2), **values)
        self.entries.append(entry)
        self.listener(entry)
        return entry

    def _kept(self) -> str:
        file = self.options.output / "adapter.safetensors"
        return f"the last complete adapter is {file}" if file.exists() else "there is no adapter yet"

    def stop_if_broken(self, in_a_row: int) -> None:
        if in_a_row >= _NAN_STEPS:
            raise DistillationError(
                f"loss: the gradient was not finite for {in_a_row} steps in a row, up to about step {self.step}; "
                f"{self._kept()}"
            )

    @staticmethod
    def _check_tokens(vocabulary: int, files: list[TokenWindows]) -> None:
        for file in files:
            largest = int(file.tokens.max(initial=0))
            if largest >= vocabulary:
                raise ValueError(f"{file.name}: got token {largest}, needs tokens of the decoder, below {vocabulary}")


class _Meter:
    """Sums losses on the device and logs them every few steps, once their copy has reached the host."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        # KL, cross-entropy of continuations, cross-entropy of reconstructions, gradient norm, bad steps in a row
        self._sums = torch.zeros(5, device=run.device)
        self._rows = [0, 0]  # with a teacher, without
        self._waiting: tuple[Any, torch.Tensor, dict[str, Any]] | None = None
        self.begin()

    def begin(self) -> None:
        """Measure speed from now on."""
        self._since, self._tokens, self._seen = time.monotonic(), self._run.tokens, self._run.step

    def state(self) -> dict[str, Any]:
        """Return the sums since the last entry, so that the first entry after a resume is over all of its steps."""
        return {"sums": self._sums.cpu().clone(), "rows": list(self._rows)}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what ``state`` returned."""
        self._sums.copy_(state["sums"])
        self._rows = list(state["rows"])

    def count(self, batch: Batch, sums: torch.Tensor, rates: dict[str, float], progress: float) -> None:
        run = self._run
        self._sums[:3] += sums
        self._sums[3] = run.optimizer.norm
        self._sums[4] = run.optimizer.in_a_row
        continued = batch.shape.continuations * batch.shape.output
        self._rows[0] += continued
        self._rows[1] += len(batch.targets) - continued
        self._log(wait=False)
        if run.step % run.options.log_every == 0:
            self._take(rates, progress)

    def flush(self) -> None:
        """Log the remaining sums."""
        self._log(wait=True)
        if self._run.step > self._seen:
            self._take({}, 1.0)
            self._log(wait=True)

    def _take(self, rates: dict[str, float], progress: float) -> None:
        self._log(wait=True)
        run, now = self._run, time.monotonic()
        steps = run.step - self._seen
        values = {
            "step": run.step, "tokens": run.tokens, "progress": round(progress, 4),
            "tokens_per_second": round((run.tokens - self._tokens) / max(1e-9, now - self._since)),
            "seconds_per_step": round((now - self._since) / max(1, steps), 4),
            "rates": {name: round(rate, 8) for name, rate in rates.items()}, "rows": list(self._rows),
        }  # fmt: skip
        host, event = self._sums.to("cpu"), None
        if run.device.type == "cuda":
            host = torch.empty(5, pin_memory=True).copy_(self._sums, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._waiting = (event, host, values)
        self._sums = torch.zeros_like(self._sums)
        self._rows = [0, 0]
        self._since, self._tokens, self._seen = now, run.tokens, run.step

    def _log(self, *, wait: bool) -> None:
        if self._waiting is None:
            return
        event, host, values = self._waiting
        if event is not None:
            if not wait and not event.query():
                return
            event.synchronize()
        self._waiting = None
        kl, cross_entropy, reconstruction, norm, in_a_row = host.tolist()
        taught, rewritten = (max(1, count) for count in values.pop("rows"))
        losses = {"kl": kl / taught, "cross_entropy": cross_entropy / taught,
                  "reconstruction": reconstruction / rewritten, "norm": norm}  # fmt: skip
        shown = {name: round(value, 4) if math.isfinite(value) else None for name, value in losses.items()}
        self._run.note("step", **values, **shown)
        self._run.stop_if_broken(int(in_a_row))


def read_files(options: DistillOptions) -> tuple[TokenWindows, dict[str, TokenWindows]]:
    """Return the training tokens, and the held-out domains by file name.

    Raises
    ------
    ValueError
        If a training file contains one of ``HELD_OUT_DOMAINS`` or a document of a held-out file, or if a file was made
        with a tokenizer other than the decoder's. The message names the file or document.
    """
    tokenizer = _tokenizer(options.decoder or weights.decoder_folder())
    made_with, inside = tokenizer_hash(tokenizer), tokens_inside_characters(tokenizer)
    tokens, offsets, sources = load_tokens(options.tokens, training=True, tokenizer=made_with)
    for held in HELD_OUT_DOMAINS:
        if held in sources:
            raise ValueError(f"tokens: document {sources.index(held)} is from {held}, which must be held out")
    train = TokenWindows(tokens, offsets, "tokens", inside)
    own = {_digest(train, document) for document in range(len(train.offsets) - 1)}
    domains = {}
    for path in options.heldout:
        domain = TokenWindows(*load_tokens([path], tokenizer=made_with)[:2], f"heldout {path}", inside)
        same = [document for document in range(len(domain.offsets) - 1) if _digest(domain, document) in own]
        if same:
            raise ValueError(f"tokens: document {same[0]} of {path} is also a training document, needs to be held out")
        domains[path.stem.removeprefix("heldout-")] = domain
    return train, domains


def _tokenizer(decoder: Path) -> Any:
    """Return the decoder's tokenizer, which is needed to find where characters begin."""
    try:
        return AutoTokenizer.from_pretrained(decoder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"decoder: {decoder} has no readable tokenizer, needs the one of the token files: {error}"
        ) from None


def _digest(file: TokenWindows, document: int) -> int:
    return hash(file.tokens[file.offsets[document] : file.offsets[document + 1]].tobytes())


def _first_token(config: Any) -> int:
    """Return the token that begins every sequence: as ``prefix_ids`` does, but from the config alone."""
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(config, name, None)
        if token is not None:
            return int(token[0] if isinstance(token, list) else token)
    raise ValueError("decoder: its config has neither bos_token_id nor eos_token_id, needs one to put before the slots")


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _size(shape: Shape) -> int:
    return shape.continuations * shape.continuation_rows + shape.reconstructions * shape.reconstruction_rows
