"""The last stage of the recipe: the expansion policy, on documents and a trained, frozen model."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from refrag.adapters import add_policy
from refrag.bundle import ModelBundle
from refrag.data.documents import Documents, prefix_ids
from refrag.model.policy import ExpansionPolicy
from refrag.training.policy_gradient import PolicySettings, policy_optimizer, rollout_rewards, train_policy
from refrag.training.samples import Sample, collate_for, next_paragraph


@dataclasses.dataclass(frozen=True)
class PolicyStage:
    """What the policy reads and how it learns.

    Attributes
    ----------
    settings : PolicySettings
    chunks : int
        Of each context.
    output_tokens : int
        o, whose log-likelihood is the reward.
    width, num_heads : int
        Of the policy.
    checkpoint_every : int
        In steps.
    precision : {"bf16", "no"}
        Of the passes that score rollouts: bfloat16 autocast, or the model's own dtype. The policy itself is float32.
    """

    settings: PolicySettings
    chunks: int
    output_tokens: int
    width: int = 128
    num_heads: int = 4
    checkpoint_every: int = 20
    precision: str = "no"

    def __post_init__(self) -> None:
        if self.precision not in ("bf16", "no"):
            raise ValueError(f"precision: got {self.precision!r}, needs bf16 or no")


def run_policy_stage(
    parts: ModelBundle,
    stage: PolicyStage,
    documents: Documents,
    adapter: str | os.PathLike[str],
    folder: str | os.PathLike[str],
) -> list[dict[str, Any]]:
    """Train the policy of a trained model; write the adapter with it into ``folder``.

    A run that was broken off goes on from its last checkpoint.

    Parameters
    ----------
    parts : ModelBundle
        With the adapter loaded.
    stage : PolicyStage
    documents : Documents
        To train on.
    adapter : path
        The one that ``parts`` hold.
    folder : path

    Returns
    -------
    list of dict
        The log.

    Raises
    ------
    ValueError
        If the folder holds a checkpoint of another stage.
    """
    model = parts.model.eval().requires_grad_(False)
    context = stage.chunks * parts.k
    windows = documents.windows(context + stage.output_tokens)
    prefix = prefix_ids(parts.tokenizer)
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(stage.settings.seed)
    policy = ExpansionPolicy(model.config.chunk_width, stage.width, num_heads=stage.num_heads)
    optimizer = policy_optimizer(policy, stage.settings)
    checkpoint, log_file, entries = root / "checkpoint.pt", root / "log.jsonl", []
    signature = {"stage": dataclasses.asdict(stage), **parts.signature()}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["signature"] != signature:
            raise ValueError(f"{checkpoint}: was made with {state['signature']}, this run has {signature}")
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        entries = state["log"]

    def lower_precision() -> torch.autocast:
        return torch.autocast(model.device.type, torch.bfloat16, enabled=stage.precision == "bf16")

    @torch.no_grad()
    def contexts(index: int) -> tuple[Sample, torch.Tensor]:
        tokens, cuttable = windows.draw(stage.settings.seed, index)
        sample = next_paragraph(tokens, context, parts.k, parts.tokenizer, prefix, cuttable=cuttable)
        prompt, _ = collate_for(parts, [sample])
        with lower_precision():
            return sample, model.encode_chunks(prompt.encoder_input)

    def reward(sample: Sample, rollouts: Sequence[frozenset[int]], embeds: torch.Tensor) -> torch.Tensor:
        with lower_precision():
            return rollout_rewards(model, functools.partial(collate_for, parts), sample, rollouts, embeds)

    with tqdm(total=stage.settings.steps, initial=len(entries), unit="step") as bar:

        def log(entry: dict[str, float]) -> None:
            entries.append(entry)
            log_file.write_text("".join(json.dumps(line) + "\n" for line in entries))
            bar.update()
            bar.set_postfix_str(f"reward {entry['reward']:.3f}")
            if len(entries) % stage.checkpoint_every == 0:
                part = checkpoint.with_suffix(".part")
                torch.save(
                    {"policy": policy.state_dict(), "optimizer": optimizer.state_dict(), "log": entries,
                     "signature": signature}, part,
                )  # fmt: skip
                os.replace(part, checkpoint)

        train_policy(policy, contexts, reward, stage.settings, log=log, first_step=len(entries), optimizer=optimizer)
    add_policy(adapter, policy, root)
    return entries
