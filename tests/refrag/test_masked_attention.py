"""Decode steps of decoders with softcap, sinks or windows equal eager attention's logits at every step."""

import pytest
import torch
from refrag.model import masked_attention as module
from refrag.model.masked_attention import masked_attention

from tests.refrag import tiny
from tests.refrag.test_acceptance import made
from tests.support.accuracy import relative_error

FAMILIES = {
    # name: features of its attention
    "Gemma2": dict(attn_logit_softcapping=2.0, sliding_window=9, head_dim=16),
    "GptOss": dict(sliding_window=9, head_dim=16, num_local_experts=2, num_experts_per_tok=1),
    "GraniteSWA": dict(sliding_window=9, head_dim=16),
    "GraniteMoeSWA": dict(sliding_window=9, head_dim=16, num_local_experts=2, num_experts_per_tok=1),
    "VaultGemma": dict(attn_logit_softcapping=2.0, sliding_window=9, head_dim=16),
}
HOW = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0)


@pytest.fixture
def steps(monkeypatch):
    """Record the decode steps that paged_attention computes."""
    calls, step = [], module._step

    def counting(*args):
        calls.append(args[0].shape)
        return step(*args)

    monkeypatch.setattr(module, "_step", counting)
    return calls


def random(name):
    model = made(name, **FAMILIES[name])
    for parameter, value in model.named_parameters():
        if parameter.endswith("sinks"):
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
    return model


def eager(name):
    model = random(name)
    model.set_attn_implementation("eager")
    return model


def ours(name):
    return tiny.RefragForCausalLM.from_parts(tiny.encoder("bert"), random(name), 4).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_equals_eagers_at_every_step(name, steps):
    prompt = tiny.prompt([[("text", 20)], [("text", 13)]])  # two lengths: left padding longer than the window
    plain, model = eager(name), ours(name)
    steps.clear()  # calls of the probe
    got = model.generate(prompt, **HOW)
    layers, new = model.decoder.config.num_hidden_layers, HOW["max_new_tokens"]
    assert len(steps) == layers * (new - 1)
    for index, ids in enumerate(prompt.token_ids.split([20, 13])):
        wanted = plain.generate(ids[None], **HOW)
        assert torch.equal(got.sequences[index], wanted.sequences[0, len(ids) :])
        for step, (own, expected) in enumerate(zip(got.logits, wanted.logits, strict=True)):
            assert relative_error(own[index], expected[0]) < 3e-5, step


@pytest.mark.parametrize("cache", ["static", None])
@pytest.mark.parametrize("name", ["Gemma2", "GptOss"])
def test_a_state_and_other_caches(name, cache):
    prompt = tiny.prompt([[("text", 20)]])
    wanted = eager(name).generate(prompt.token_ids[None], **HOW)
    model = ours(name)
    if cache is None:
        state = model.read(prompt)
        got = model.generate(state=state, **HOW)
    else:
        got = model.generate(prompt, cache_implementation=cache, **HOW)
    assert torch.equal(got.sequences[0], wanted.sequences[0, 20:])
    assert relative_error(torch.stack(got.logits), torch.stack(wanted.logits)) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_padded_tokens_and_their_gradients_equal_eagers(name):
    plain, model = eager(name).train(), ours(name).decoder.train()
    ids, mask = torch.randint(3, 97, (2, 24)), torch.ones(2, 24, dtype=torch.int64)
    mask[1, :9] = 0
    losses = []
    with torch.enable_grad():
        for one in (plain, model):
            logits = one(ids, attention_mask=mask, use_cache=False).logits
            losses.append(torch.cat([logits[0], logits[1, 9:]]))
            losses[-1].logsumexp(-1).sum().backward()
    assert relative_error(losses[1], losses[0]) < 1e-5
    largest = max((p.grad for p in plain.parameters() if p.grad is not None), key=torch.linalg.norm)
    for (parameter, a), (_, b) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        if a.grad is not None:
            assert relative_error(b.grad, a.grad, largest) < 1e-4, parameter


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_equals_the_definition(rows, dtype):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, rows, 16, generator=generator).to(dtype)
    key, value = torch.randn(2, 2, 2, 11, 16, generator=generator).to(dtype)
    sinks = torch.randn(6, generator=generator)
    mask = torch.rand(2, 1, rows, 11, generator=generator) < 0.6  # with holes
    mask[..., 4] = True
    scores = query.double() @ key.double().repeat_interleave(3, 1).mT * 0.3
    scores = (2 * torch.tanh(scores / 2)).masked_fill(~mask, -torch.inf)
    weights = torch.cat([scores, sinks.double()[None, :, None, None].expand(2, 6, rows, 1)], -1).softmax(-1)[..., :-1]
    wanted = (weights @ value.double().repeat_interleave(3, 1)).transpose(1, 2)
    got = masked_attention(query, key, value, mask, scale=0.3, softcap=2.0, sinks=sinks)
    assert got.shape == wanted.shape and got.dtype == dtype
    assert relative_error(got, wanted) < (1e-2 if dtype == torch.bfloat16 else 2e-6)


def test_a_fully_masked_row_is_finite():
    states = torch.randn(1, 2, 3, 16)
    mask = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    assert masked_attention(states, states, states, mask).isfinite().all()


def test_a_plain_step_stays_with_torchs_attention(monkeypatch):
    monkeypatch.setattr("refrag.attention.masked_attention", None)
    tiny.refrag("llama").generate(tiny.prompt(tiny.MIXED[:1]), max_new_tokens=3, do_sample=False)
