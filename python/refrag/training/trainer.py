"""The training loop, with Accelerate for devices and precision, checkpoints to resume runs, and a log."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from refrag.file_modes import usual_mode
from refrag.model.inputs import MixedPrompt
from refrag.model.modeling import RefragForCausalLM
from refrag.training.config_files import write_config
from refrag.training.generators import generator_states, restore_generators
from refrag.training.options import LoopOptions
from refrag.training.passes import cut_passes, make_passes
from refrag.training.samples import Sample, Sampler

# Full (unsharded) trained parameters under the model's own names, regardless of how Accelerate wraps the model.
_FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)

Collate = Callable[[Sequence[Sample]], tuple[MixedPrompt, torch.Tensor]]


class TrainingError(RuntimeError):
    """Raised if training can't continue; the message states the reason and which checkpoint was kept."""


class Trainer:
    """Trains the parameters that ``prepare`` selected.

    Parameters
    ----------
    model : RefragForCausalLM
    sampler : callable
        A sample's index -> the sample.
    collate : callable
        Samples -> a packed prompt and its labels.
    options : LoopOptions
    output : path
        Folder of ``log.jsonl``, ``options.toml`` and ``checkpoints/``. If it contains an interrupted run, the trainer
        resumes it.
    evaluate : callable, optional
        Model -> metrics by name, for the log.
    signature : dict, optional
        Further properties that must equal a checkpoint's to resume it: k, the models, the stage.
    accelerator : Accelerator, optional
        Determines precision and devices; the settings of ``accelerate launch`` and its config apply as usual.

    Raises
    ------
    TrainingError
        If there are more processes than samples in a step.
    """

    def __init__(
        self,
        model: RefragForCausalLM,
        sampler: Sampler,
        collate: Collate,
        options: LoopOptions,
        output: str | os.PathLike[str],
        *,
        evaluate: Callable[[RefragForCausalLM], dict[str, Any]] | None = None,
        signature: dict[str, Any] | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.accelerator = accelerator or Accelerator()
        if options.batch_size < self.accelerator.num_processes:  # checked here, so that every process raises
            raise TrainingError(
                f"batch_size: got {options.batch_size}, needs {self.accelerator.num_processes} or more, one sample for "
                "each process"
            )
        self.sampler, self.collate, self.options = sampler, collate, options
        self.output = Path(output)
        self.evaluate = evaluate
        self.signature = {"settings": _settings(options), **(signature or {})}
        self.plain = model
        groups = _parameter_groups(model, options)
        optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay, betas=options.betas)
        schedule = get_cosine_schedule_with_warmup(
            optimizer, max(1, round(options.warmup * options.steps)), options.steps
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.schedule = schedule
        self.step = 0
        self.tokens = 0
        self.losses: list[float] = []  # one per step since the last log entry

    def train(self) -> list[dict[str, Any]]:
        """Train to the last step, resuming from the newest checkpoint if there is one.

        Returns
        -------
        list of dict
            The log.

        Raises
        ------
        TrainingError
            If the loss is not finite (the last checkpoint is kept, and the message names the step and its samples), or
            if the folder contains checkpoints of another run.
        """
        set_seed(self.options.seed)
        self._resume()
        main = self.accelerator.is_main_process
        if main:
            write_config(self.options, self.output)
        began, tokens_before = time.perf_counter(), self.tokens
        with tqdm(total=self.options.steps, initial=self.step, disable=not main, unit="step") as bar:
            while self.step < self.options.steps:
                self.losses.append(self._step())
                bar.update()
                rate = (self.tokens - tokens_before) / (time.perf_counter() - began)
                bar.set_postfix_str(f"loss {self.losses[-1]:.3f}, {rate:.0f} tokens/s")
                last = self.step == self.options.steps
                evaluated = {}
                if self.evaluate and (last or self.step % self.options.evaluate_every == 0):
                    evaluated = self._evaluate()
                if evaluated or last or self.step % self.options.log_every == 0:
                    entry = {"step": self.step, "loss": sum(self.losses) / len(self.losses), "tokens": self.tokens,
                             "learning_rate": self.schedule.get_last_lr()[0], "tokens_per_second": rate,
                             **evaluated}  # fmt: skip
                    self._log(entry)
                    self.losses = []
                if last or self.step % self.options.checkpoint_every == 0:
                    self._save()
        return self.read_log()

    def read_log(self) -> list[dict[str, Any]]:
        """Return the log's entries."""
        path = self.output / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _step(self) -> float:
        """Take one optimizer step; return the mean loss per target token."""
        accelerator, world = self.accelerator, self.accelerator.num_processes
        first = self.step * self.options.batch_size
        indices = range(first + accelerator.process_index, first + self.options.batch_size, world)
        samples = [self.sampler(index) for index in indices]
        passes = cut_passes(samples, self.options.max_rows)
        passes = make_passes(passes, self._most_passes(passes))
        own = torch.tensor(sum(sample.num_targets for sample in samples), device=accelerator.device)
        targets = int(accelerator.reduce(own, "sum"))
        total = torch.zeros((), device=accelerator.device)
        self.model.train()
        for number, part in enumerate(passes):
            prompt, labels = self.collate(part or passes[0][:1])
            if not part:  # an empty pass, whose loss counts no token, keeps processes in lockstep
                labels = labels.fill_(-100)
            # Synchronize gradients once per step, in the last pass.
            last = number == len(passes) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                output = self.model(
                    prompt=prompt.to(accelerator.device), labels=labels.to(accelerator.device),
                    num_items_in_batch=targets, use_cache=False,
                )  # fmt: skip
                # DDP averages gradients, but each process's loss is a part of the sum: undo the average.
                accelerator.backward(output.loss * world)
            total += output.loss.detach().float()
            del output
        loss = float(accelerator.reduce(total, "sum"))
        if not math.isfinite(loss):
            raise TrainingError(
                f"loss: got {loss} in step {self.step + 1}, samples {first} to {first + self.options.batch_size - 1}; "
                f"the newest checkpoint is {self._newest_checkpoint() or 'none'}"
            )
        # Call this once for all parameter groups, because Accelerate unscales float16 gradients here; and with the
        # wrapped model's parameters, because Accelerate compares them with those of sharded models.
        accelerator.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.tokens += targets
        return loss

    def _most_passes(self, passes: list[list[Sample]]) -> int:
        """Return the maximum number of passes over all processes."""
        if self.accelerator.num_processes == 1:
            return len(passes)
        counts = self.accelerator.gather(torch.tensor([len(passes)], device=self.accelerator.device))
        return int(counts.max())

    def _evaluate(self) -> dict[str, Any]:
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast(), _unsharded(self.plain):
            return self.evaluate(self.plain)  # type: ignore[misc]

    def _log(self, entry: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            with open(self.output / "log.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")

    # A checkpoint's folder is written under a temporary name and renamed once it is complete.

    def _save(self) -> None:
        # All processes must call this: sharded parameters are gathered to the main process.
        trained, optimizer = get_state_dict(self.model, self.optimizer.optimizer, options=_FULL_STATE)
        generators = generator_states(self.accelerator)
        if not self.accelerator.is_main_process:
            return
        final = self.output / "checkpoints" / f"step-{self.step:08d}"
        part = final.with_name(".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        own = {name for name, _ in self.plain.named_parameters()}  # lists tied weights only once
        kept = {name: cast(torch.Tensor, value).contiguous() for name, value in trained.items() if name in own}
        save_file(kept, part / "trained.safetensors")
        os.chmod(part / "trained.safetensors", usual_mode(part))
        torch.save(
            {"optimizer": optimizer, "schedule": self.schedule.state_dict(), "step": self.step,
             "tokens": self.tokens, "losses": self.losses, "generators": generators,
             "log_entries": len(self.read_log())},
            part / "state.pt",
        )  # fmt: skip
        (part / "signature.json").write_text(json.dumps(self.signature, indent=1))
        os.replace(part, final)
        for old in sorted(final.parent.glob("step-*"))[:-2]:
            shutil.rmtree(old)

    def _newest_checkpoint(self) -> Path | None:
        return max((self.output / "checkpoints").glob("step-*"), default=None)

    def _resume(self) -> None:
        checkpoint = self._newest_checkpoint()
        log = self.output / "log.jsonl"
        if checkpoint is None:
            log.unlink(missing_ok=True)
            return
        written = json.loads((checkpoint / "signature.json").read_text())
        # Settings that were added after the checkpoint was written had their defaults.
        written["settings"] = json.loads(json.dumps(_settings(LoopOptions()))) | written["settings"]
        wanted = json.loads(json.dumps(self.signature))
        for name in sorted(written.keys() | wanted.keys()):
            if written.get(name) != wanted.get(name):
                raise TrainingError(
                    f"{checkpoint}: was written with {name} = {written.get(name)}, this run has {wanted.get(name)}; "
                    "use another folder, or the same settings"
                )
        state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        trained: dict[str, Any] = load_file(checkpoint / "trained.safetensors")
        set_state_dict(
            self.model, self.optimizer.optimizer, model_state_dict=trained, optim_state_dict=state["optimizer"],
            options=dataclasses.replace(_FULL_STATE, strict=False),  # checkpoints omit frozen parameters
        )  # fmt: skip
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.tokens = state["step"], state["tokens"]
        # Checkpoints of earlier versions have no losses, and only the main process's generator state.
        self.losses = list(state.get("losses", []))
        restore_generators(self.accelerator, state.get("generators") or [{"cpu": state["random"]}])
        if self.accelerator.is_main_process:
            # Entries from after the checkpoint will be logged again.
            kept = log.read_text().splitlines(keepends=True)[: state["log_entries"]]
            log.write_text("".join(kept))


@contextlib.contextmanager
def _unsharded(model: RefragForCausalLM) -> Iterator[None]:
    """Gather the FSDP-sharded parameters that are used outside ``forward``; layers gather their own when they run."""
    sharded: list[Any] = [part for part in (model, model.get_input_embeddings()) if hasattr(part, "unshard")]
    for part in sharded:
        part.unshard()
    try:
        yield
    finally:
        for part in sharded:
            part.reshard()


def _settings(options: LoopOptions) -> dict[str, Any]:
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(LoopOptions)}


def _parameter_groups(model: nn.Module, options: LoopOptions) -> list[dict[str, Any]]:
    rates = {"projector": options.projector_rate, "encoder": options.encoder_rate, "": options.learning_rate}
    groups: dict[str, list[nn.Parameter]] = {prefix: [] for prefix in rates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            prefix = name.split(".", 1)[0]
            groups[prefix if prefix in rates else ""].append(parameter)
    return [
        {"params": parameters, "lr": rates[prefix] or options.learning_rate}
        for prefix, parameters in groups.items()
        if parameters
    ]
