"""Options of transformers' models: they work on packed rows, too, or are refused by name."""

import pytest
import torch
from refrag import RefragForCausalLM

from tests.refrag import tiny
from tests.refrag.test_acceptance import made
from tests.support.accuracy import relative_error

HOW = dict(max_new_tokens=4, do_sample=False)


def text(rows):
    return tiny.prompt([[("text", count)] for count in rows])


@pytest.mark.parametrize("tied", [True, False])
def test_the_token_table_can_be_resized(tied, tmp_path):
    model = RefragForCausalLM.from_parts(tiny.encoder("bert"), made("Llama", tie_word_embeddings=tied), 4).eval()
    prompt = tiny.prompt(tiny.MIXED)
    before = model(prompt=prompt).logits
    table = model.resize_token_embeddings(120)
    assert table is model.get_input_embeddings() and table.weight.shape[0] == model.config.text_config.vocab_size == 120
    assert (model.get_output_embeddings().weight is table.weight) == tied
    after = model(prompt=prompt).logits
    assert torch.equal(after[..., :97], before) and after.shape[-1] == 120
    model.save_pretrained(tmp_path)
    assert torch.equal(RefragForCausalLM.from_pretrained(tmp_path)(prompt=prompt).logits, after)


@pytest.mark.parametrize("beams", [1, 2])
def test_hidden_states_of_generation_equal_the_plain_decoders(beams):
    prompt = text([9, 14])
    how = dict(**HOW, num_beams=beams, output_hidden_states=True, return_dict_in_generate=True, pad_token_id=0)
    got = tiny.refrag("mistral").generate(prompt, **how).hidden_states
    for index, ids in enumerate(prompt.token_ids.split([9, 14])):
        own = tiny.decoder("mistral").generate(ids[None], **how).hidden_states
        assert len(got) == len(own)
        for mine, theirs in zip(got[0], own[0], strict=True):  # the prompt, left-padded
            for beam in range(beams):
                assert relative_error(mine[index * beams + beam, -len(ids) :], theirs[beam]) < 1e-5
    model = tiny.refrag("mistral")
    with pytest.raises(ValueError, match="output_hidden_states: got True, needs False: a state keeps no hidden states"):
        model.generate(text([9]), state=model.read(text([5])), output_hidden_states=True, **HOW)


def test_options_that_packed_rows_do_not_support_are_refused():
    model, prompt = tiny.refrag(), text([9])
    refused = {
        "assistant_model": (tiny.decoder("llama"), "packed prompts don't support assisted decoding"),
        "prompt_lookup_num_tokens": (3, "packed prompts don't support assisted decoding"),
        "guidance_scale": (1.5, "got 1.5, needs negative_prompt_ids"),
        "output_attentions": (True, "packed rows never materialize attention weights"),
    }
    for name, (value, why) in refused.items():
        for more in ({}, {"state": model.read(prompt)}):
            with pytest.raises(ValueError, match=f"{name}: .*{why}"):
                model.generate(prompt, **{name: value}, **more, **HOW)
    with pytest.raises(ValueError, match="output_attentions: got True"):
        model(prompt=prompt, output_attentions=True)
    model.generation_config.guidance_scale = 1.5
    with pytest.raises(ValueError, match="guidance_scale: got 1.5"):
        model.generate(prompt, **HOW)


def test_the_advice_of_refusals_works():
    prompt, ids = text([9]), text([9]).token_ids[None]
    model, plain = tiny.refrag(), tiny.decoder("llama")
    guided = dict(**HOW, guidance_scale=1.5, negative_prompt_ids=torch.tensor([[7, 8]]), pad_token_id=0)
    assert torch.equal(model.generate(prompt, **guided), plain.generate(ids, **guided)[:, 9:])


def test_tuples():
    model, prompt = tiny.refrag(), tiny.prompt(tiny.MIXED)
    output = model(prompt=prompt, labels=prompt.token_ids, return_dict=False)
    wanted = model(prompt=prompt, labels=prompt.token_ids)
    assert type(output) is tuple and torch.equal(output[0], wanted.loss) and torch.equal(output[1], wanted.logits)
    decoder = tiny.decoder("llama")
    decoder.config.return_dict = False
    with pytest.raises(ValueError, match="decoder.config.return_dict: got False, needs True"):
        RefragForCausalLM.from_parts(tiny.encoder("bert"), decoder)


@pytest.mark.parametrize("scale", [True, False])
def test_an_embedding_scaled_by_a_plain_number(scale):
    decoder, prompt = made("BioGpt", scale_embedding=scale), text([9, 14])
    wanted = [decoder(ids[None]).logits[0] for ids in prompt.token_ids.split([9, 14])]
    model = RefragForCausalLM.from_parts(tiny.encoder("bert"), decoder, 4).eval()
    assert relative_error(model(prompt=prompt).logits[0], torch.cat(wanted)) < 1e-5
    model.resize_token_embeddings(120)
    assert relative_error(model(prompt=prompt).logits[0, :, :97], torch.cat(wanted)) < 1e-5
    assert model.to(torch.bfloat16)(prompt=prompt).logits.isfinite().all()
