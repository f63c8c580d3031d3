"""A packed prompt is refused if the cache holds rows: its plans cover only its own rows."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.refrag import tiny


@pytest.mark.parametrize("decoder", tiny.DECODERS)
def test_forward_and_generate_refuse_it(decoder):
    model, prompt = tiny.refrag(decoder), tiny.prompt([[("text", 5), ("slot", 0), ("text", 14)]])
    cache = DynamicCache(config=model.decoder.config)
    model(prompt=prompt, past_key_values=cache, use_cache=True)
    message = "past_key_values: got a cache with 20 rows, needs an empty one"
    with pytest.raises(ValueError, match=message):
        model(prompt=prompt, past_key_values=cache)
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize("make", [DynamicCache, StaticCache])
def test_an_empty_cache_is_accepted(make):
    model, prompt = tiny.refrag(), tiny.prompt([[("text", 5), ("slot", 0), ("text", 14)]])
    options = dict(max_cache_len=40) if make is StaticCache else {}
    cache = make(config=model.decoder.config, **options)
    expected = model(prompt=prompt).logits
    assert torch.allclose(model(prompt=prompt, past_key_values=cache, use_cache=True).logits, expected, atol=1e-5)


def test_tokens_are_appended_as_usual():
    model, prompt = tiny.refrag(), tiny.prompt([[("text", 20)]])
    cache = DynamicCache(config=model.decoder.config)
    first = tiny.prompt([[("text", 20)]])
    model(prompt=first, past_key_values=cache, use_cache=True)
    more = torch.tensor([[7, 8, 9]])
    whole = torch.cat([prompt.token_ids[None], more], 1)
    got = model(input_ids=more, past_key_values=cache).logits
    assert torch.allclose(got, model.decoder(whole).logits[:, -3:], atol=1e-4)


def test_generate_names_an_empty_sequence():
    with pytest.raises(ValueError, match="prompt: sequence 1 is empty, needs at least one row"):
        tiny.refrag().generate(tiny.prompt([[("text", 5)], [], [("text", 3)]]), max_new_tokens=2)
