"""The log-likelihood of labels equals that of the decoder's own logits, whatever head computes them."""

import pytest
import torch
from refrag import RefragForCausalLM
from refrag.training.likelihood import target_log_probs

from tests.refrag import tiny
from tests.refrag.test_acceptance import made

DECODERS = {
    "Granite": dict(logits_scaling=4.0, embedding_multiplier=3.0),
    "Cohere": dict(logit_scale=0.25),
    "Gemma2": dict(final_logit_softcapping=2.0, head_dim=16),
    "Roberta": dict(is_decoder=True),  # a head with a transform
    "OPT": dict(ffn_dim=64, word_embed_proj_dim=64, do_layer_norm_before=True),
    "StableLm": {},
    "Mixtral": dict(num_local_experts=2),
}


@pytest.mark.parametrize("name", DECODERS)
def test_equals_the_decoders_own_logits(name):
    decoder = made(name, **DECODERS[name])
    if name == "Roberta":  # its positions start after the padding index, so that from_parts refuses it
        decoder.set_attn_implementation("refrag")
        decoder.refrag_accepted = True
    model = RefragForCausalLM.from_parts(tiny.encoder("bert"), decoder, 4).eval()
    prompt = tiny.prompt(tiny.MIXED)
    labels = torch.full_like(prompt.token_ids, -100)
    labels[[3, 9, 18, 22, 39]] = torch.tensor([7, 50, 96, 4, 5])
    log_probs, rows = target_log_probs(model, prompt, labels)
    assert rows.tolist() == [3, 9, 18, 22, 39]
    own = model(prompt=prompt).logits[0, rows - 1].double().log_softmax(-1)
    torch.testing.assert_close(log_probs.double(), own.gather(1, labels[rows][:, None])[:, 0], rtol=1e-5, atol=1e-5)


def test_gradients_reach_what_stands_before_the_head():
    model, prompt = tiny.refrag(), tiny.prompt(tiny.MIXED)
    labels = prompt.token_ids.clone()
    labels[[0, 19]] = -100
    with torch.enable_grad():
        target_log_probs(model, prompt, labels)[0].sum().backward()
    assert model.projector.up.weight.grad.abs().sum() > 0 and model.decoder.lm_head.weight.grad.abs().sum() > 0
