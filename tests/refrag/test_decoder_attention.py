"""The decoder's attention equals Hugging Face's, is causal, and never crosses sequences."""

import copy

import pytest
import torch
from refrag.model import attention
from transformers import AutoModelForCausalLM

from refrag_kernels import ChunkLayout, ChunkMask
from tests.refrag import tiny
from tests.support.accuracy import relative_error

BOUND = 1e-5


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_expanded_prompt_equals_the_plain_decoder(name, decoders):
    prompt = tiny.prompt([[("text", 9), ("expanded", 4, 0), ("expanded", 4, 0), ("expanded", 3, 1), ("text", 20)]])
    expected = decoders[name](prompt.token_ids[None]).logits
    assert relative_error(tiny.refrag(name)(prompt=prompt).logits, expected) < BOUND


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_packed_sequences_equal_each_alone(name):
    model = tiny.refrag(name)
    prompt = tiny.prompt(tiny.MIXED)
    embeds, ends = model.embed(prompt), prompt.layout.sequence_offsets.tolist()
    packed = model(prompt=prompt).logits[0]
    plain = tiny.decoder(name)
    for start, end in zip(ends, ends[1:]):
        alone = plain(inputs_embeds=embeds[None, start:end]).logits[0]
        assert relative_error(packed[start:end], alone) < BOUND


@pytest.mark.parametrize("with_plans", [True, False])
@pytest.mark.parametrize("name", tiny.DECODERS)
def test_is_causal(name, with_plans):
    # transformers silently loses causality in a model whose config became part of a composite one.
    decoder = tiny.refrag(name).decoder
    ids = torch.randint(3, tiny.VOCABULARY, (1, 30))
    other = ids.clone()
    other[0, -1] = 3 + (ids[0, -1] - 2) % (tiny.VOCABULARY - 3)
    kwargs = {}
    if with_plans:
        layout = ChunkLayout.from_lengths([[10, 20]])
        kwargs["refrag_plans"] = attention.AttentionPlans(layout, ChunkMask.full(), causal=True)
        kwargs["attention_mask"] = attention.no_mask(ids.device)
    first, second = decoder(ids, **kwargs).logits, decoder(other, **kwargs).logits
    assert torch.equal(first[:, :-1], second[:, :-1])
    assert not torch.equal(first[:, -1], second[:, -1])


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_without_plans_equals_sdpa(name, decoders):
    ids = torch.randint(3, tiny.VOCABULARY, (2, 30))
    mask = torch.ones_like(ids)
    mask[1, :12] = 0
    ours = tiny.refrag(name).decoder(ids, attention_mask=mask).logits
    theirs = decoders[name](ids, attention_mask=mask).logits
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1, 12:], theirs[1, 12:])


def test_creating_a_model_leaves_another_decoder_unchanged(decoders):
    decoder = tiny.decoder("llama")
    before = decoder(torch.arange(3, 20)[None]).logits
    model = tiny.refrag("llama")
    model.config.text_config._attn_implementation = None
    assert decoder.config._attn_implementation == "sdpa"
    assert torch.equal(decoder(torch.arange(3, 20)[None]).logits, before)


def test_passages_do_not_attend_to_each_other():
    model = tiny.refrag(decoder_mask="passages")
    spans = [[("text", 3), ("expanded", 4, 0), ("expanded", 4, 1), ("text", 5)]]
    prompt = tiny.prompt(spans)
    token_ids = prompt.token_ids.clone()
    token_ids[3:7] = token_ids[3:7].flip(0) + 1
    changed = copy.copy(prompt)
    object.__setattr__(changed, "token_ids", token_ids)
    before, after = model(prompt=prompt).logits[0], model(prompt=changed).logits[0]
    assert torch.equal(before[7:11], after[7:11]), "the second passage must not attend to the first"
    assert not torch.allclose(before[11:], after[11:]), "the shared text must attend to both"


def test_refuses_batches_with_plans():
    model = tiny.refrag()
    prompt = tiny.prompt(tiny.MIXED)
    states = torch.zeros(2, 4, prompt.layout.total_rows, 16)
    with pytest.raises(ValueError, match="query: got a batch of 2"):
        attention.refrag_attention(model.decoder, states, states, states, None, refrag_plans=model.plans(prompt))


def test_warns_that_attention_dropout_is_ignored(monkeypatch):
    said = []
    monkeypatch.setattr(attention._logger, "warning_once", said.append)
    model = tiny.refrag()
    prompt = tiny.prompt(tiny.MIXED)
    model.encode_chunks(prompt.encoder_input)
    assert not said
    model.encoder.train()
    model.encode_chunks(prompt.encoder_input)
    assert "dropout: 0.1 on attention weights is ignored" in said[0]


def test_refuses_packed_rows_on_another_attention():
    model = tiny.refrag()
    prompt = tiny.prompt(tiny.MIXED)
    model.decoder.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="decoder: got attention 'sdpa', needs 'refrag'"):
        model(prompt=prompt)
    with pytest.raises(ValueError, match="decoder: got attention"):
        model.generate(prompt, max_new_tokens=1)
    model.encoder.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="encoder: got attention"):
        model.encode_chunks(prompt.encoder_input)


def test_attention_is_refrag_for_a_plain_model_too():
    model = AutoModelForCausalLM.from_config(copy.deepcopy(tiny.DECODERS["llama"]), attn_implementation="refrag")
    assert model.config._attn_implementation == "refrag"
