"""Sampling without replacement, compared to brute force, and the policy that scores chunks."""

import itertools
import math

import pytest
import torch
from refrag.model.policy import ExpansionPolicy, picks_log_prob, sample_picks

INF = float("inf")


def brute_force(scores, picks):
    """Compute the log-probability of each pick from its definition: a softmax over the remaining chunks."""
    left, result = dict(enumerate(scores)), []
    for pick in picks:
        total = sum(math.exp(s) for s in left.values())
        result.append(math.log(math.exp(left.pop(pick)) / total))
    return result


@pytest.mark.parametrize("count", [1, 2, 4])
def test_log_probs_of_all_rankings(count):
    scores = torch.tensor([0.3, -1.2, 2.0, 0.0], dtype=torch.float64)
    rankings = list(itertools.permutations(range(4), count))
    got = picks_log_prob(scores.expand(len(rankings), -1), torch.tensor(rankings))
    expected = torch.tensor([brute_force(scores.tolist(), ranking) for ranking in rankings], dtype=torch.float64)
    assert torch.allclose(got, expected, rtol=1e-12)
    assert got.sum(1).exp().sum().item() == pytest.approx(1, rel=1e-12)


def test_ragged_rows_and_missing_picks():
    scores = torch.tensor([[0.5, 1.0, -INF, -INF], [0.1, 0.2, 0.3, 0.4], [-INF] * 4])
    picks = torch.tensor([[1, 0, -1], [3, -1, -1], [-1, -1, -1]])
    got = picks_log_prob(scores, picks)
    assert torch.allclose(got[0, :2], torch.tensor(brute_force([0.5, 1.0], [1, 0])))
    assert torch.allclose(got[1, :1], torch.tensor(brute_force([0.1, 0.2, 0.3, 0.4], [3])))
    assert got[0, 2] == 0 and (got[1, 1:] == 0).all() and (got[2] == 0).all()
    assert picks_log_prob(scores, torch.tensor([[2], [0], [-1]]))[0, 0] == -INF


def test_gradients():
    torch.manual_seed(0)
    with torch.enable_grad():
        scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        picks = torch.tensor([[4, 0, 2, 1, 3], [1, -1, -1, -1, -1], [-1] * 5])
        assert torch.autograd.gradcheck(lambda s: picks_log_prob(s, picks), (scores,))
        ragged = torch.tensor([[1.0, 2.0, -INF]], requires_grad=True)
        picks_log_prob(ragged, torch.tensor([[0, 1, -1]])).sum().backward()
        assert ragged.grad.isfinite().all() and ragged.grad[0, 0] != 0


def test_samples_follow_the_log_probs():
    scores = torch.tensor([1.0, 0.0, -0.5, -INF])
    draws = 20000
    picks = sample_picks(scores.expand(draws, -1), 2, torch.Generator().manual_seed(0))
    for ranking in itertools.permutations(range(3), 2):
        expected = math.exp(sum(brute_force(scores[:3].tolist(), ranking)))
        share = (picks == torch.tensor(ranking)).all(1).float().mean().item()
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / draws), ranking
    assert not (picks == 3).any()


def test_counts():
    scores = torch.randn(4, 6)
    scores[3, 2:] = -INF
    picks = sample_picks(scores, torch.tensor([0, 2, 6, 5]), torch.Generator().manual_seed(1))
    assert picks.shape == (4, 6)
    assert (picks >= 0).sum(1).tolist() == [0, 2, 6, 2]
    assert sorted(picks[2].tolist()) == list(range(6)) and set(picks[3, :2].tolist()) == {0, 1}
    again = sample_picks(scores, torch.tensor([0, 2, 6, 5]), torch.Generator().manual_seed(1))
    assert torch.equal(picks, again)
    assert sample_picks(scores, 0).shape == (4, 0)
    assert sample_picks(torch.zeros(0, 3), 2).shape == (0, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_picks(torch.zeros(2, 3), 4), "count: got 4, needs 0 to 3"),
        (lambda: sample_picks(torch.zeros(2, 3), torch.tensor([1, -1])), "count: got -1"),
        (lambda: sample_picks(torch.zeros(2, 3), torch.tensor([1])), r"count: got torch.int64 \[1\]"),
        (lambda: sample_picks(torch.zeros(3), 1), r"scores: got torch.float32 \[3\]"),
        (lambda: sample_picks(torch.tensor([[math.nan, 0]]), 1), "scores: got NaN"),
        (lambda: picks_log_prob(torch.zeros(1, 3), torch.tensor([[3]])), "picks: got 3, needs -1 to 2"),
        (lambda: picks_log_prob(torch.zeros(1, 3), torch.tensor([[1, 1]])), "picks: got a chunk twice"),
        (lambda: picks_log_prob(torch.zeros(1, 3), torch.tensor([[-1, 1]])), "picks: got a pick after -1"),
        (lambda: picks_log_prob(torch.zeros(2, 3), torch.tensor([[1]])), r"picks: got torch.int64 \[1, 1\]"),
        (lambda: ExpansionPolicy(8, width=10, num_heads=4), "width: got 10"),
        (lambda: ExpansionPolicy(8)(torch.zeros(1, 2, 9)), r"chunk_embeds: got \[1, 2, 9\]"),
        (lambda: ExpansionPolicy(8)(torch.zeros(1, 2, 8), torch.ones(2)), r"counts: got \[2\]"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def random_policy(seed=0):
    torch.manual_seed(seed)
    policy = ExpansionPolicy(16, width=32)
    torch.nn.init.normal_(policy.score.weight)
    return policy.eval()


def test_an_untrained_policy_prefers_nothing():
    assert torch.equal(ExpansionPolicy(16)(torch.randn(2, 5, 16)), torch.zeros(2, 5))


def test_scores_depend_only_on_the_sequences_own_chunks():
    policy, embeds = random_policy(), torch.randn(3, 6, 16)
    counts = torch.tensor([6, 3, 0])
    embeds[1, 3:] = math.nan
    embeds[2] = math.nan
    scores = policy(embeds, counts)
    assert torch.allclose(scores[1, :3], policy(embeds[1:2, :3])[0], atol=1e-5)
    assert (scores[1, 3:] == -INF).all() and (scores[2] == -INF).all() and not scores.isnan().any()


def test_scores_depend_on_the_order():
    policy, embeds = random_policy(), torch.randn(1, 4, 16)
    assert not torch.allclose(policy(embeds).flip(1), policy(embeds.flip(1)), atol=1e-3)


def test_a_policy_learns_to_pick():
    """REINFORCE with a reward for chunks marked in their first element: the gradient increases the reward."""
    torch.manual_seed(0)
    with torch.enable_grad():
        policy = ExpansionPolicy(8, width=16, num_heads=2)
        optimizer = torch.optim.Adam(policy.parameters(), 1e-2)
        for _ in range(60):
            embeds = torch.randn(32, 6, 8)
            picks = sample_picks(scores := policy(embeds), 2)
            reward = embeds[..., 0].gather(1, picks).sum(1)
            loss = -((reward - reward.mean()) * picks_log_prob(scores, picks).sum(1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        embeds = torch.randn(500, 6, 8)
        picks = policy(embeds).topk(2).indices
    best = embeds[..., 0].topk(2).values.sum(1).mean()
    assert embeds[..., 0].gather(1, picks).sum(1).mean() > 0.8 * best
