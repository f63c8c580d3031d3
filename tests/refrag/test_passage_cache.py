"""PassageCache: cached passages give the same logits, and entries that don't apply to a prompt aren't used."""

import copy
import dataclasses

import pytest
import torch
from refrag import PassageCache, PromptTooLongError
from refrag.model.key_rotation import KeyRotation
from transformers import AutoModelForCausalLM, GPT2Config, SmolLM3Config

from tests.refrag import tiny
from tests.support.accuracy import relative_error

BOUND = 1e-5
A = [("slot", 0), ("expanded", 4, 0), ("slot", 0)]
B = [("expanded", 3, 1), ("slot", 1)]
C = [("slot", 2), ("slot", 2), ("expanded", 5, 2)]
BEFORE, AFTER = [("text", 6)], [("text", 9)]


@pytest.fixture(autouse=True)
def wide_windows(monkeypatch):
    """Use windows longer than the prompts; test_refuses_windows has shorter ones."""
    for name, window in (("mistral", 64), ("gemma3", 64)):
        config = copy.deepcopy(tiny.DECODERS[name])
        config.sliding_window = window
        monkeypatch.setitem(tiny.DECODERS, name, config)


def model_of(name="llama", **fields):
    return tiny.refrag(name, decoder_mask="passages", **fields)


def arranged(prompt, order, *, parallel=False):
    """Return a prompt of [text,] passages [, text] with its passages reordered and some of them omitted."""
    ids = prompt.passage_of_span.tolist()
    first, last = ids.index(0), len(ids) - 1 - ids[::-1].index(max(ids))
    spans = [span for passage in order for span in range(first, last + 1) if ids[span] == passage]
    taken = prompt.take([*range(first), *spans, *range(last + 1, len(ids))])
    positions, position, start, furthest, before = [], 0, 0, 0, None
    for rows, passage in zip(taken.layout.lengths()[0], taken.passage_of_span.tolist()):
        if parallel and passage != before:
            position = furthest if passage < 0 else start
        positions += range(position, position + rows)
        position += rows
        furthest = max(furthest, position)
        start = position if passage < 0 else start
        before = passage
    return dataclasses.replace(taken, position_ids=torch.tensor(positions))


def without_cache(model, prompt):
    return model(prompt=prompt).logits[0, -1:]


def rows_read(model):
    """Record the number of rows that go through the decoder."""
    counts = []
    model.decoder.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: counts.append((args[0] if args else kwargs["hidden_states"]).shape[1]), with_kwargs=True
    )
    return counts


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_passages_are_found_at_any_place(name):
    model = model_of(name)
    cache, counts = PassageCache(model), rows_read(model)
    whole = tiny.prompt([A + B + C + AFTER], seed=3)
    for order, misses in (((0, 1), 2), ((1, 0), 0), ((2, 1, 0), 1), ((0, 2, 1), 0), ((2,), 0)):
        prompt = arranged(whole, order)
        before = cache.misses
        counts.clear()
        state = cache.read(prompt)
        read = sum(counts)
        assert cache.misses - before == misses
        assert relative_error(state.last_logits()[0], without_cache(model, prompt)) < BOUND
        if not misses:
            assert read == 9, "only the text after the passages may be read"
    assert (cache.hits, cache.misses, len(cache)) == (8, 3, 3)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_passages_after_text_are_found_anywhere_with_parallel_positions(name):
    model = model_of(name)
    cache = PassageCache(model)
    whole = tiny.prompt([BEFORE + A + B + C + AFTER], seed=4)
    for order, hits in (((0, 1), 0), ((1, 0), 2), ((2, 1, 0), 4), ((0, 2), 6)):
        prompt = arranged(whole, order, parallel=True)
        state = cache.read(prompt)
        assert relative_error(state.last_logits()[0], without_cache(model, prompt)) < BOUND
        assert cache.hits == hits
    assert cache.misses == 3


def test_passages_after_text_are_found_at_the_same_distance_only():
    model = model_of()
    cache = PassageCache(model)
    whole = tiny.prompt([BEFORE + A + B + C + AFTER], seed=4)
    # B is in the place of C after A, with another content; A in the first place is found, B in it is not.
    for order, hits in (((0, 1), 0), ((0, 2), 1), ((1, 0), 1), ((0, 1, 2), 3)):
        prompt = arranged(whole, order)
        state = cache.read(prompt)
        assert relative_error(state.last_logits()[0], without_cache(model, prompt)) < BOUND
        assert cache.hits == hits


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("parallel", [False, True])
def test_keys_and_values_do_not_depend_on_the_order_of_passages(name, parallel):
    """The premise of the cache, with full prefills: values are equal, and keys are after undoing their rotation."""
    model = model_of(name)
    whole = tiny.prompt([(BEFORE if parallel else []) + A + B + C + AFTER], seed=5)
    seen = []
    for order in ((0, 1, 2), (2, 0, 1)):
        prompt = arranged(whole, order, parallel=parallel)
        layers = model(prompt=prompt, use_cache=True).past_key_values.layers
        of_row = prompt.passage_of_span.repeat_interleave(prompt.layout.chunk_offsets.diff())
        for passage in range(3):
            rows = of_row == passage
            keys = unrotated(model, [layer.keys[0, :, rows] for layer in layers], prompt.position_ids[rows])
            seen.append((passage, keys + [layer.values[0, :, rows] for layer in layers]))
    for passage, states in seen[:3]:
        other = next(states for number, states in seen[3:] if number == passage)
        for state, expected in zip(states, other, strict=True):
            assert relative_error(state, expected) < BOUND


def unrotated(model, keys, positions):
    """Undo RoPE with complex numbers, independently of refrag.model.key_rotation."""
    config = model.config.text_config
    kinds = config.layer_types if isinstance(next(iter(config.rope_parameters.values())), dict) else [None] * len(keys)
    result = []
    for layer, kind in zip(keys, kinds):
        theta = (config.rope_parameters[kind] if kind else config.rope_parameters)["rope_theta"]
        half = layer.shape[-1] // 2
        angles = positions[:, None].double() * theta ** (-torch.arange(half, dtype=torch.float64) / half)
        parts = torch.complex(layer[..., :half].double(), layer[..., half:].double())
        result.append(torch.view_as_real(parts * torch.polar(torch.ones_like(angles), -angles)))
    return result


@pytest.mark.parametrize("parallel", [False, True])
def test_generation_continues_from_the_cache(parallel):
    model = model_of()
    cache = PassageCache(model)
    whole = tiny.prompt([(BEFORE if parallel else []) + A + B + C + AFTER], seed=6)
    cache.read(arranged(whole, (2, 1), parallel=parallel))
    prompt = arranged(whole, (1, 0, 2), parallel=parallel)
    assert parallel == (prompt.layout.total_rows > prompt.position_ids.max() + 1)
    got = model.generate(state=cache.read(prompt), max_new_tokens=6, do_sample=False)
    assert torch.equal(got, model.generate(prompt, max_new_tokens=6, do_sample=False))
    state = cache.read(prompt)
    model.expand(state, 0)
    assert relative_error(state.last_logits(), _expanded(model, prompt)) < BOUND


def _expanded(model, prompt):
    state = model.read(prompt)
    model.expand(state, 0)
    return state.last_logits()


@pytest.mark.parametrize("what", ["token", "chunk", "embedding", "before", "step"])
def test_changed_content_is_not_found(what):
    model = model_of()
    cache = PassageCache(model)
    prompt = arranged(tiny.prompt([BEFORE + A + AFTER], seed=7), (0,))
    embeds = model.encode_chunks(prompt.encoder_input) if what == "embedding" else None
    cache.read(prompt, chunk_embeds=embeds)
    changed = prompt
    if what in ("token", "before"):
        row = int((prompt.slot_of_row < 0).nonzero()[0 if what == "before" else 6])
        assert (row < 6) == (what == "before")
        tokens = prompt.token_ids.clone()
        tokens[row] += 1
        changed = dataclasses.replace(prompt, token_ids=tokens)
    elif what == "chunk":
        texts = prompt.encoder_input.token_ids.clone()
        texts[0] += 1
        changed = dataclasses.replace(prompt, encoder_input=dataclasses.replace(prompt.encoder_input, token_ids=texts))
    elif what == "embedding":
        embeds = embeds.clone()
        embeds[0, 0] += 1
    else:
        positions = prompt.position_ids.clone()
        positions[8:] += 1
        changed = dataclasses.replace(prompt, position_ids=positions)
    state = cache.read(changed, chunk_embeds=embeds)
    assert (cache.hits, cache.misses) == (0, 2)
    expected = model(prompt=changed, chunk_embeds=embeds).logits[0, -1:]
    assert relative_error(state.last_logits()[0], expected) < BOUND


def test_the_least_recently_used_entry_is_evicted():
    model = model_of()
    whole = tiny.prompt([A + B + C + AFTER], seed=8)
    big = PassageCache(model)
    sizes = []
    for passage in range(3):
        big.read(arranged(whole, (passage,)))
        sizes.append(big.nbytes - sum(sizes))
    assert sizes == [
        rows * 3 * 2 * 2 * 16 * 4 for rows in (6, 4, 7)
    ]  # layers, keys and values, heads, head_dim, float32
    small = PassageCache(model, max_bytes=sizes[0] + sizes[2])
    for passage in (0, 1, 0, 2):
        small.read(arranged(whole, (passage,)))
    assert small.nbytes == sizes[0] + sizes[2] and small.hits == 1
    small.read(arranged(whole, (0, 2)))
    assert small.hits == 3
    prompt = arranged(whole, (1, 0, 2))  # the three don't fit together, but the answer is still right
    assert relative_error(small.read(prompt).last_logits()[0], without_cache(model, prompt)) < BOUND
    assert small.nbytes <= sizes[0] + sizes[2]
    small.clear()
    assert len(small) == small.nbytes == 0


def test_bfloat16_is_as_accurate_as_without_the_cache():
    model = model_of()
    whole = tiny.prompt([A + B + C + AFTER], seed=9)
    prompt = arranged(whole, (2, 0, 1))
    exact = without_cache(model, prompt)
    low = copy.deepcopy(model).bfloat16()
    cache = PassageCache(low)
    cache.read(arranged(whole, (0, 1, 2)))
    got = cache.read(prompt).last_logits()[0]
    assert cache.hits == 3
    assert relative_error(got, exact) < 1.5 * relative_error(without_cache(low, prompt), exact) + 5e-3


def other_decoder(config):
    torch.manual_seed(1)
    decoder = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    tiny._spread(decoder)
    return decoder


def test_refuses_decoders_whose_keys_cannot_be_moved():
    for kind, more in (("dynamic", {}), ("longrope", {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8})):
        config = copy.deepcopy(tiny.DECODERS["llama"])
        config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, **more,
                                  "original_max_position_embeddings": 256}  # fmt: skip
        with pytest.raises(ValueError, match=f"decoder: got LlamaForCausalLM with RoPE of type '{kind}', whose freq"):
            KeyRotation(other_decoder(config))
    with pytest.raises(ValueError, match="decoder: got GPT2LMHeadModel, which has no rotary embedding"):
        KeyRotation(other_decoder(GPT2Config(vocab_size=97, n_embd=48, n_layer=1, n_head=2)))
    partly = SmolLM3Config(**tiny._DECODER, no_rope_layers=[1, 0, 1])
    with pytest.raises(
        ValueError, match="decoder: got SmolLM3ForCausalLM, whose layer 1 rotates its keys in another way"
    ):
        KeyRotation(other_decoder(partly))
    KeyRotation(other_decoder(SmolLM3Config(**tiny._DECODER, no_rope_layers=[1, 1, 1])))


def test_yarn_scales_keys_once():
    config = copy.deepcopy(tiny.DECODERS["llama"])
    config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                              "original_max_position_embeddings": 64}  # fmt: skip
    KeyRotation(other_decoder(config))


def test_refuses():
    with pytest.raises(ValueError, match="decoder_mask: got 'full', needs 'passages'"):
        PassageCache(tiny.refrag())
    with pytest.raises(ValueError, match="max_bytes: got 0"):
        PassageCache(model_of(), max_bytes=0)
    cache = PassageCache(model_of())
    for spans, message in (
        ([A + [("text", 2)] + B + AFTER], r"shared text between passages \(span 3\)"),
        ([BEFORE + A], "ends with a passage or is empty"),
        ([[]], "ends with a passage or is empty"),
        ([A + AFTER, B + AFTER], "got 2 sequences, needs one"),
        ([A + [("slot", 1)] + [("slot", 0)] + AFTER], "a passage in two places"),
    ):
        with pytest.raises(ValueError, match=f"prompt: .*{message}"):
            cache.read(tiny.prompt(spans))
    with pytest.raises(PromptTooLongError, match="are 9 over the decoder's window of 256"):
        cache.read(tiny.prompt([A + [("text", 259)]]))
    assert len(cache) == 0
    alone = tiny.prompt([AFTER])
    assert relative_error(cache.read(alone).last_logits()[0], without_cache(cache.model, alone)) < BOUND


def test_refuses_windows_that_a_prompt_exceeds():
    cache = PassageCache(model_of("mistral"))
    cache.read(tiny.prompt([A + [("text", 58)]]))
    with pytest.raises(ValueError, match="prompt: got 65 rows, needs at most the 64 of the decoder's sliding window"):
        cache.read(tiny.prompt([A + [("text", 59)]]))
