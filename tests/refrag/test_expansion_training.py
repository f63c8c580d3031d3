"""Training of the policy: rewards don't depend on packing, and a policy learns what is rewarded."""

import dataclasses
import functools

import pytest
import torch
from refrag.model.policy import ExpansionPolicy
from refrag.training.likelihood import share_beginning, target_log_probs
from refrag.training.options import PolicyOptions, RolloutOptions
from refrag.training.policy_gradient import (
    clipped_objective,
    group_advantage,
    rollout_rewards,
    train_policy,
)
from refrag.training.samples import collate_for, next_paragraph

from tests.refrag import training_parts


@pytest.fixture
def parts(tokenizer, encoder_tokenizer):
    own = training_parts.parts(tokenizer, encoder_tokenizer)
    own.model.eval()
    return own


@pytest.fixture
def sample(parts):
    ids = training_parts.documents(parts.tokenizer).token_ids[:40].tolist()
    return next_paragraph(ids, 32, 4, parts.tokenizer, [1, 5, 6])


def one_by_one(parts, sample, rollouts):
    rewards = []
    for picks in rollouts:
        prompt, labels = collate_for(parts, [dataclasses.replace(sample, expanded=picks)])
        logits = parts.model(prompt=prompt).logits[0].log_softmax(-1)
        rows = (labels != -100).nonzero()[:, 0]
        rewards.append(logits[rows - 1, labels[rows]].mean())
    return torch.stack(rewards)


@pytest.mark.parametrize(
    "rollouts",
    [
        [{6}, {7}, {6, 7}, {5}],  # five slots and the prefix are shared
        [{0}, {1}, {2}, {3}],  # only the prefix is shared
        [{0, 5}, {0, 6}, {0, 7}, {0}],  # an expanded chunk is shared
        [{2}, {2}],  # everything is shared
        [set()],
    ],
)
def test_rewards_are_those_of_one_forward_each(parts, sample, rollouts):
    rollouts = [frozenset(picks) for picks in rollouts]
    prompt, _ = collate_for(parts, [sample])
    embeds = parts.model.encode_chunks(prompt.encoder_input)
    wanted = one_by_one(parts, sample, rollouts)
    for share in (True, False):
        rewards = rollout_rewards(
            parts.model, functools.partial(collate_for, parts), sample, rollouts, embeds, share=share
        )
        torch.testing.assert_close(rewards, wanted, rtol=1e-5, atol=1e-5)


def test_what_rollouts_begin_with_stands_once(parts, sample):
    def joined(rollouts):
        variants = [dataclasses.replace(sample, expanded=frozenset(picks)) for picks in rollouts]
        prompt, labels = collate_for(parts, variants)
        return prompt, share_beginning(prompt, labels)

    prompt, (shared, labels, mask) = joined([{6}, {7}, {5, 6}])
    assert mask is not None
    # The prefix and five slots once; per rollout three chunks, one or two of them expanded, and eight tokens.
    assert shared.layout.total_rows == 3 + 5 + (6 + 8) + (6 + 8) + (9 + 8)
    assert prompt.layout.total_rows == shared.layout.total_rows + 2 * 8
    assert int((labels >= 0).sum()) == 3 * 8
    _, alike = joined([{6}, {6}])  # only the last chunk's row and the target remain
    assert alike[0].layout.total_rows == 3 + 6 + 4 + 2 * (1 + 8)
    assert joined([{0}, {1}, {0, 1}])[1] is None  # the prefix of three rows is less than a tenth
    assert joined([{3}])[1] is None


def test_first_rows_have_no_log_probability(parts, sample):
    prompt, labels = collate_for(parts, [sample])
    labels[0] = 3
    with pytest.raises(ValueError, match="labels: got one for a sequence's first row"):
        target_log_probs(parts.model, prompt, labels)


def test_advantage_and_clip_by_hand():
    advantage = group_advantage(torch.tensor([[1.0, 3.0], [2.0, 2.0]]))
    torch.testing.assert_close(advantage, torch.tensor([[-(0.5**0.5), 0.5**0.5], [0.0, 0.0]]))
    old = torch.log(torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    new = torch.log(torch.tensor([[0.9, 0.1], [0.9, 0.45]]))
    made = torch.tensor([[True, True], [True, False]])
    gain = clipped_objective(new, old, torch.tensor([1.0, -1.0]), made, 0.2)
    # For a good rollout, ratios 1.8 and 0.2 give 1.2 and 0.2; 1.8 of a bad one is not clipped.
    assert gain.item() == pytest.approx(((1.2 + 0.2) / 2 - 1.8) / 2)


def test_a_policy_learns_what_is_rewarded(sample):
    """The reward is the share of picks among chunks whose embeddings have a mark, which the policy must find."""
    torch.manual_seed(0)
    policy = ExpansionPolicy(8, width=32, num_heads=2)

    def contexts(index):
        generator = torch.Generator().manual_seed(index)
        embeds = torch.randn(6 + index % 5, 8, generator=generator)
        embeds[torch.randperm(len(embeds), generator=generator)[:2], 3] = 6.0
        return sample, embeds

    def reward(sample, rollouts, embeds):
        marked = set((embeds[:, 3] == 6.0).nonzero()[:, 0].tolist())
        return torch.tensor([len(picks & marked) / len(picks) for picks in rollouts])

    log = []
    options = RolloutOptions(steps=60, contexts=8, rollouts=6, expand=0.25, learning_rate=3e-3)
    with torch.enable_grad():
        train_policy(policy, contexts, reward, options, log=log.append)
    first, last = (sum(entry["reward"] for entry in part) / len(part) for part in (log[:3], log[-10:]))
    assert first < 0.5 and last > 0.9
    assert not policy.training


def test_wide_embeddings_do_not_drown_what_a_place_is_worth(sample):
    """Thousands of uninformative, similar dimensions, as in real embeddings, and one position that matters."""
    torch.manual_seed(0)
    policy = ExpansionPolicy(4608, width=32, num_heads=2)
    generator = torch.Generator().manual_seed(0)
    alike = torch.randn(4608, generator=generator)
    worth = 0.05 * torch.randn(120, 8, generator=generator)
    worth[:, 7] += 0.14

    def embeds():
        return alike + 0.5 * torch.randn(8, 4608, generator=generator)

    def reward(sample, rollouts, own):
        return torch.stack([worth[sample, list(picks)].sum() for picks in rollouts])

    options = RolloutOptions(steps=30, contexts=4, rollouts=8, expand=0.25, learning_rate=1e-3)
    with torch.enable_grad():
        train_policy(policy, lambda index: (index, embeds()), reward, options)
        chances = policy(torch.stack([embeds() for _ in range(16)])).softmax(1).mean(0)
    assert chances[7] > 0.3 and chances[:7].max() < 0.2


def test_bad_settings():
    with pytest.raises(ValueError, match="rollouts: got 1"):
        RolloutOptions(steps=1, rollouts=1)
    with pytest.raises(ValueError, match="expand: got 0"):
        RolloutOptions(steps=1, expand=0)


def policy_options(**given):
    small = {"contexts": 2, "rollouts": 3, "expand": 0.25, "chunks": 4, "output_tokens": 4, "width": 16, "num_heads": 2}
    return PolicyOptions(**{"data": (), "precision": "no", **small, **given})


def test_the_stage_keeps_its_policy_in_the_adapter(tmp_path, tokenizer, parts):
    from refrag.adapters import TrainableSpec, load_adapter, prepare, save_adapter
    from refrag.training.policy_stage import run_policy_stage

    save_adapter(prepare(parts.model, TrainableSpec(train_encoder="none")), tmp_path / "model")
    documents = training_parts.documents(tokenizer)

    def run(steps, folder):
        options = policy_options(adapter=tmp_path / "model", output=folder, steps=steps, checkpoint_every=2)
        with torch.enable_grad():
            return run_policy_stage(parts, options, documents)

    log = run(5, tmp_path / "policy")
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5]
    fresh = training_parts.parts(tokenizer, parts.encoder_tokenizer)
    _, policy = load_adapter(tmp_path / "policy", fresh.model.decoder, fresh.model.encoder)
    assert policy.settings() == {"embedding_size": 32, "width": 16, "num_layers": 2, "num_heads": 2}
    # The names in a checkpoint of b88c934.
    assert torch.load(tmp_path / "policy" / "checkpoint.pt")["signature"] == {
        "stage": {
            "settings": {
                "steps": 5, "contexts": 2, "rollouts": 3, "share": 0.25, "epsilon": 0.2, "updates": 2,
                "learning_rate": 3e-4, "max_grad_norm": 1.0, "seed": 0,
            },
            "chunks": 4, "output_tokens": 4, "width": 16, "num_heads": 2, "checkpoint_every": 2, "precision": "no",
        },
        **parts.signature(),
    }  # fmt: skip
    # Resuming from the checkpoint at step 4 gives the same result.
    (tmp_path / "policy" / "adapter.safetensors").unlink()
    assert run(5, tmp_path / "policy") == log
    with pytest.raises(ValueError, match="was written with"):
        run(6, tmp_path / "policy")


def test_rollouts_can_be_scored_in_lower_precision(tmp_path, tokenizer, parts):
    from refrag.adapters import TrainableSpec, prepare, save_adapter
    from refrag.training.policy_stage import run_policy_stage

    save_adapter(prepare(parts.model, TrainableSpec(train_encoder="none")), tmp_path / "model")
    documents = training_parts.documents(tokenizer)
    rewards = {}
    for precision in ("no", "bf16"):
        options = policy_options(adapter=tmp_path / "model", output=tmp_path / precision, steps=1, precision=precision)
        with torch.enable_grad():
            log = run_policy_stage(parts, options, documents)
        rewards[precision] = log[0]["reward"]
    assert rewards["bf16"] != rewards["no"]
    assert rewards["bf16"] == pytest.approx(rewards["no"], rel=0.02)
    with pytest.raises(ValueError, match="precision: got 'fp8'"):
        dataclasses.replace(options, precision="fp8")
