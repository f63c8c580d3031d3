"""The last stage of the training recipe: train the expansion policy for a trained, frozen model."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from refrag.adapters import add_policy
from refrag.bundle import ModelBundle
from refrag.data.documents import Documents, prefix_ids
from refrag.model.policy import ExpansionPolicy
from refrag.training.config_files import write_config
from refrag.training.options import PolicyOptions
from refrag.training.policy_gradient import policy_optimizer, rollout_rewards, train_policy
from refrag.training.samples import Sample, collate_for, next_paragraph


def run_policy_stage(parts: ModelBundle, options: PolicyOptions, documents: Documents) -> list[dict[str, Any]]:
    """Train a policy for a trained model, and write the adapter with the policy into ``options.output``.

    An interrupted run resumes from its last checkpoint.

    Parameters
    ----------
    parts : ModelBundle
        The model of ``options.adapter``.
    options : PolicyOptions
    documents : Documents
        Training documents.

    Returns
    -------
    list of dict
        The log.

    Raises
    ------
    ValueError
        If the folder contains a checkpoint of a run with other options.
    """
    model = parts.model.eval().requires_grad_(False)
    context = options.chunks * parts.k
    windows = documents.windows(context + options.output_tokens)
    prefix = prefix_ids(parts.tokenizer)
    output = options.output
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    policy = ExpansionPolicy(model.config.chunk_width, options.width, num_heads=options.num_heads)
    optimizer = policy_optimizer(policy, options)
    checkpoint, log_file, entries = output / "checkpoint.pt", output / "log.jsonl", []
    signature = {"stage": _stage(options), **parts.signature()}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["signature"] != signature:
            raise ValueError(f"{checkpoint}: was written with {state['signature']}, this run has {signature}")
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        entries = state["log"]
    write_config(options, output)

    def lower_precision() -> torch.autocast:
        return torch.autocast(model.device.type, torch.bfloat16, enabled=options.precision == "bf16")

    @torch.no_grad()
    def contexts(index: int) -> tuple[Sample, torch.Tensor]:
        tokens, cuttable = windows.draw(options.seed, index)
        sample = next_paragraph(tokens, context, parts.k, parts.tokenizer, prefix, cuttable=cuttable)
        prompt, _ = collate_for(parts, [sample])
        with lower_precision():
            return sample, model.encode_chunks(prompt.encoder_input)

    def reward(sample: Sample, rollouts: Sequence[frozenset[int]], embeds: torch.Tensor) -> torch.Tensor:
        with lower_precision():
            return rollout_rewards(model, functools.partial(collate_for, parts), sample, rollouts, embeds)

    with tqdm(total=options.steps, initial=len(entries), unit="step") as bar:

        def log(entry: dict[str, float]) -> None:
            entries.append(entry)
            log_file.write_text("".join(json.dumps(line) + "\n" for line in entries))
            bar.update()
            bar.set_postfix_str(f"reward {entry['reward']:.3f}")
            if len(entries) % options.checkpoint_every == 0:
                part = checkpoint.with_suffix(".part")
                torch.save(
                    {"policy": policy.state_dict(), "optimizer": optimizer.state_dict(), "log": entries,
                     "signature": signature}, part,
                )  # fmt: skip
                os.replace(part, checkpoint)

        train_policy(policy, contexts, reward, options, log=log, first_step=len(entries), optimizer=optimizer)
    add_policy(options.adapter, policy, output)
    return entries


def _stage(options: PolicyOptions) -> dict[str, Any]:
    """Return the options that must equal a checkpoint's, with the structure and names of the checkpoint file."""
    nested = ("steps", "contexts", "rollouts", "epsilon", "updates", "learning_rate", "max_grad_norm", "seed")
    own = ("chunks", "output_tokens", "width", "num_heads", "checkpoint_every", "precision")
    settings = {"share": options.expand, **{name: getattr(options, name) for name in nested}}
    return {"settings": settings, **{name: getattr(options, name) for name in own}}
