"""Reinforcement learning of the expansion policy (REFRAG, A.1): grouped rollouts and a clipped objective."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from refrag.model.modeling import RefragForCausalLM
from refrag.model.policy import ExpansionPolicy, picks_log_prob, sample_picks
from refrag.training.likelihood import share_beginning, target_log_probs
from refrag.training.options import RolloutOptions
from refrag.training.samples import Sample
from refrag.training.trainer import Collate


def group_advantage(rewards: torch.Tensor) -> torch.Tensor:
    """Return each rollout's advantage within its group: ``(r - mean) / std`` (GRPO).

    Parameters
    ----------
    rewards : Tensor [B, G]
        Rewards of G rollouts for each of B contexts.

    Returns
    -------
    Tensor [B, G]
        0 if all rewards of a group are equal.

    Examples
    --------
    >>> group_advantage(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
    tensor([[-1.,  0.,  1.],
            [ 0.,  0.,  0.]])
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    deviation = rewards.std(1, keepdim=True)
    return torch.where(deviation > 1e-6, centred / deviation.clamp(min=1e-6), 0.0)


def clipped_objective(
    log_prob: torch.Tensor, old_log_prob: torch.Tensor, advantage: torch.Tensor, made: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """Return PPO's clipped objective, to be maximised (arXiv 1707.06347, equation 7).

    Parameters
    ----------
    log_prob, old_log_prob : Tensor [R, n]
        Log-probability of each pick of R rollouts under the current policy, and under the one that made the rollouts.
    advantage : Tensor [R]
    made : Tensor, bool [R, n]
        False for the padding of shorter rollouts.
    epsilon : float
        How far the probability ratio may differ from 1 before it is clipped.

    Returns
    -------
    Tensor []
        The mean over each rollout's picks, then over rollouts.
    """
    ratio = (log_prob - old_log_prob).exp()
    gain = advantage[:, None]
    terms = torch.minimum(ratio * gain, ratio.clamp(1 - epsilon, 1 + epsilon) * gain)
    picks = made.sum(1)
    return ((terms * made).sum(1) / picks.clamp(min=1))[picks > 0].mean()


@torch.no_grad()
def rollout_rewards(
    model: RefragForCausalLM,
    collate: Collate,
    sample: Sample,
    rollouts: Sequence[frozenset[int]],
    chunk_embeds: torch.Tensor,
    *,
    share: bool = True,
) -> torch.Tensor:
    """Score several expansions of one context in one packed forward pass.

    Parameters
    ----------
    model : RefragForCausalLM
    collate : callable
        Samples -> a packed prompt and its labels.
    sample : Sample
        Its own ``expanded`` is ignored.
    rollouts : sequence of G sets of int
        The chunks that each rollout expands.
    chunk_embeds : Tensor [L, d_enc]
        Embeddings of the sample's chunks, encoded once for all rollouts.
    share : bool
        Whether rollouts may share the rows before their first difference, if that saves more than a tenth of all rows.

    Returns
    -------
    Tensor, float32 [G]
        The negative log-perplexity: the mean log-probability of the target's tokens.
    """
    prompt, labels = collate([dataclasses.replace(sample, expanded=picks) for picks in rollouts])
    mask = None
    if share and model.config.decoder_mask == "full":
        joined = share_beginning(prompt, labels)
        if joined is not None:
            prompt, labels, mask = joined
    log_probs, _ = target_log_probs(model, prompt, labels, chunk_embeds.repeat(len(rollouts), 1), mask)
    return log_probs.view(len(rollouts), -1).mean(1)


def policy_optimizer(policy: ExpansionPolicy, options: RolloutOptions) -> torch.optim.Optimizer:
    """Return the optimizer for a policy."""
    return torch.optim.AdamW(policy.parameters(), lr=options.learning_rate, weight_decay=0.0)


def train_policy(
    policy: ExpansionPolicy,
    contexts: Callable[[int], tuple[Sample, torch.Tensor]],
    reward: Callable[[Sample, Sequence[frozenset[int]], torch.Tensor], torch.Tensor],
    options: RolloutOptions,
    *,
    log: Callable[[dict[str, float]], None] | None = None,
    first_step: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Train the policy.

    Parameters
    ----------
    policy : ExpansionPolicy
    contexts : callable
        A context's index -> the sample, and the embeddings of its L chunks.
    reward : callable
        Sample, its rollouts and its chunks' embeddings -> rewards [G], such as ``rollout_rewards`` of a model.
    options : RolloutOptions
    log : callable, optional
        Called with the metrics of each step.
    first_step : int
        The step to resume at.
    optimizer : torch.optim.Optimizer, optional
        The optimizer of the run to resume.
    """
    optimizer = optimizer or policy_optimizer(policy, options)
    policy.train()
    for step in range(first_step, options.steps):
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        drawn = [contexts(step * options.contexts + index) for index in range(options.contexts)]
        embeds = torch.nn.utils.rnn.pad_sequence([own for _, own in drawn], batch_first=True).float()
        lengths = torch.tensor([len(own) for _, own in drawn], device=embeds.device)
        counts = (options.expand * lengths).round().long().clamp(min=1)
        with torch.no_grad():
            scores = policy(embeds, lengths).repeat_interleave(options.rollouts, 0)
            picks = sample_picks(scores, counts.repeat_interleave(options.rollouts), generator)
            old = picks_log_prob(scores, picks)
        rollouts = [frozenset(row[row >= 0].tolist()) for row in picks]
        rewards = torch.stack(
            [
                reward(sample, rollouts[index * options.rollouts : (index + 1) * options.rollouts], own)
                for index, (sample, own) in enumerate(drawn)
            ]
        ).float()
        advantage = group_advantage(rewards).flatten()
        for _ in range(options.updates):
            scores = policy(embeds, lengths).repeat_interleave(options.rollouts, 0)
            gain = clipped_objective(picks_log_prob(scores, picks), old, advantage, picks >= 0, options.epsilon)
            optimizer.zero_grad()
            (-gain).backward()
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), options.max_grad_norm)
            optimizer.step()
        if log is not None:
            log({"step": step + 1, "reward": rewards.mean().item(), "spread": rewards.std(1).mean().item(),
                 "gain": gain.item(), "gradient_norm": float(norm)})  # fmt: skip
    policy.eval()
