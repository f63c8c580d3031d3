"""Incremental prefill: appended prompts, chunks and answers equal one long prompt, and a failure changes nothing."""

import dataclasses

import pytest
import torch
from refrag import Chunk, GenerationState, PromptTooLongError
from refrag.model.inputs import PackedTexts
from refrag.model.state import text_prompt

from refrag_kernels import ChunkLayout
from tests.refrag import tiny
from tests.support.accuracy import relative_error

BOUND = 1e-5
FIRST = [("text", 5), ("slot", 0), ("slot", 0), ("expanded", 4, 1), ("text", 7)]
SECOND = [("text", 2), ("slot", 0), ("expanded", 3, 1), ("slot", 2), ("text", 9)]
MODELS = [(name, "full") for name in tiny.DECODERS] + [("llama", "passages"), ("gemma3", "passages")]


def joined(*prompts):
    """Concatenate single-sequence prompts, independently of refrag.model.state."""
    tokens, slots, positions, passages, lengths, chunks, expanded, encoder_ids, encoder_lengths = ([] for _ in range(9))
    for prompt in prompts:
        first, position = len(chunks), positions[-1] + 1 if positions else 0
        numbers = max(passages, default=-1) + 1
        tokens += prompt.token_ids.tolist()
        slots += [slot if slot < 0 else first + slot for slot in prompt.slot_of_row.tolist()]
        positions += [position + own for own in prompt.position_ids.tolist()]
        passages += [own if own < 0 else numbers + own for own in prompt.passage_of_span.tolist()]
        lengths += prompt.layout.lengths()[0]
        chunks += prompt.chunks
        expanded += [first + index for index in prompt.expanded]
        encoder_ids += prompt.encoder_input.token_ids.tolist()
        encoder_lengths += prompt.encoder_input.layout.lengths()[0]
    return dataclasses.replace(
        prompts[0],
        token_ids=torch.tensor(tokens),
        slot_of_row=torch.tensor(slots, dtype=torch.int32),
        position_ids=torch.tensor(positions),
        layout=ChunkLayout.from_lengths([lengths]),
        passage_of_span=torch.tensor(passages, dtype=torch.int32),
        chunks=tuple(chunks),
        expanded=frozenset(expanded),
        encoder_input=PackedTexts(torch.tensor(encoder_ids), ChunkLayout.from_lengths([encoder_lengths])),
    )


def turns():
    return tiny.prompt([FIRST], seed=1), tiny.prompt([SECOND], seed=2)


def same_rows(state, cache):
    """Check a state's keys and values against those of a single prefill."""
    reference = cache.layers
    for layer, expected in zip(state.cache.layers, reference, strict=True):
        rows = expected.keys.shape[2]  # a sliding-window layer keeps only the last rows
        assert relative_error(layer.keys[:, :, -rows:], expected.keys) < BOUND
        assert relative_error(layer.values[:, :, -rows:], expected.values) < BOUND


@pytest.mark.parametrize(("name", "mask"), MODELS)
def test_appended_prompts_equal_one_long_prompt(name, mask):
    model = tiny.refrag(name, decoder_mask=mask)
    first, second = turns()
    state = model.read(first)
    assert model.read(second, state) is state
    whole = model(prompt=joined(first, second), use_cache=True)
    assert relative_error(state.last_logits()[0], whole.logits[0, -1:]) < BOUND
    same_rows(state, whole.past_key_values)
    assert (state.rows, state.next_position) == (whole.logits.shape[1],) * 2


@pytest.mark.parametrize(("name", "mask"), MODELS)
def test_turns_with_answers_equal_one_long_prompt(name, mask):
    model = tiny.refrag(name, decoder_mask=mask)
    how = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    first, second = turns()
    state = GenerationState()
    one = model.generate(first, state=state, **how)
    assert torch.equal(one.sequences, model.generate(first, max_new_tokens=6, do_sample=False))
    two = model.generate(second, state=state, **how)
    whole = joined(first, text_prompt(one.sequences[0].tolist()), second)
    expected = model.generate(whole, **how)
    assert torch.equal(two.sequences, expected.sequences)
    assert relative_error(torch.stack(two.logits), torch.stack(expected.logits)) < BOUND
    assert state.rows == whole.layout.total_rows + 5 and state.unread == two.sequences[0, -1:].tolist()


@pytest.mark.parametrize(("name", "mask"), MODELS)
def test_expanding_during_generation_equals_a_prompt_with_the_text(name, mask):
    model = tiny.refrag(name, decoder_mask=mask)
    first, _ = turns()
    state = model.read(first)
    said = model.generate(state=state, max_new_tokens=4, do_sample=False)[0].tolist()
    before = state.rows
    model.expand(state, 1)
    tokens = list(first.chunks[1].token_ids)
    assert state.rows == before + 1 + len(tokens), "only the last token and the chunk may be read"
    whole = model(prompt=joined(first, text_prompt(said), text_prompt(tokens)), use_cache=True)
    assert relative_error(state.last_logits()[0], whole.logits[0, -1:]) < BOUND
    same_rows(state, whole.past_key_values)
    how = dict(max_new_tokens=4, do_sample=False)
    expected = model.generate(joined(first, text_prompt(said), text_prompt(tokens)), **how)
    assert torch.equal(model.generate(state=state, **how), expected)


def test_original_positions_continue():
    model = tiny.refrag(position_ids="original")
    first, second = (dataclasses.replace(turn, position_ids=turn.position_ids * 2 + 1) for turn in turns())
    state = model.read(first)
    model.read(second, state)
    whole = model(prompt=joined(first, second))
    assert relative_error(state.last_logits()[0], whole.logits[0, -1:]) < BOUND


def test_generation_continues_where_it_stopped():
    model = tiny.refrag("gemma3")
    first, _ = turns()
    state = GenerationState()
    parts = [model.generate(first, state=state, max_new_tokens=5, do_sample=False)]
    parts += [model.generate(state=state, max_new_tokens=count, do_sample=False) for count in (1, 3)]
    assert torch.equal(torch.cat(parts, 1), model.generate(first, max_new_tokens=9, do_sample=False))


def test_expandable_chunks_and_passages():
    model = tiny.refrag()
    first, second = turns()
    named = [dataclasses.replace(chunk, passage=id) for chunk, id in zip(first.chunks, ("a", "a", "b"))]
    state = model.read(dataclasses.replace(first, chunks=tuple(named)))
    model.read(second, state)
    a, b, c = (list(chunk.token_ids) for chunk in first.chunks)
    assert state.tokens_of("a") == a + b and state.tokens_of("b") == c and state.tokens_of(2) == c
    assert state.tokens_of(3) == list(second.chunks[0].token_ids)
    assert state.tokens_of(Chunk("x", (5, 6))) == [5, 6]
    for wrong, message in ((6, "chunk: got 6, needs 0 to 5"), (-1, "chunk: got -1"), (1.0, "chunk: got 1.0")):
        with pytest.raises(ValueError, match=message):
            model.expand(state, wrong)
    with pytest.raises(ValueError, match="chunk: got passage 'z', needs one of those read: 'a', 'b'"):
        model.expand(state, "z")
    with pytest.raises(ValueError, match="chunk: got 0, needs a Chunk: none was read"):
        model.expand(model.read(text_prompt([5])), 0)


def snapshot(state):
    layers = [(layer.keys.clone(), layer.values.clone()) for layer in state.cache.layers]
    fields = {name: value for name, value in vars(state).items() if name != "cache"}
    return layers, {name: list(value) if isinstance(value, list) else value for name, value in fields.items()}


def unchanged(state, before):
    layers, fields = snapshot(state)
    assert all(torch.equal(a, b) for own, old in zip(layers, before[0], strict=True) for a, b in zip(own, old))
    assert all(fields[name] is old or fields[name] == old for name, old in before[1].items())
    assert state.cache.get_seq_length() == state.rows


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_state_unchanged(error):
    model = tiny.refrag()
    first, second = turns()
    state = model.read(first)
    before = snapshot(state)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) > 3:  # after the prompt and two generated tokens
            raise error("in the second layer")

    hook = model.decoder.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(error):
        model.generate(second, state=state, max_new_tokens=8)
    unchanged(state, before)
    with pytest.raises(error):
        model.read(second, state)
    unchanged(state, before)
    hook.remove()
    model.read(second, state)
    assert relative_error(state.last_logits()[0], model(prompt=joined(first, second)).logits[0, -1:]) < BOUND


def test_bad_arguments_are_refused():
    model = tiny.refrag()
    first, _ = turns()
    state = model.read(first)
    with pytest.raises(ValueError, match="prompt: got 2 sequences of 40 rows in total, needs one that is not empty"):
        model.read(tiny.prompt([[("text", 20)], [("text", 20)]]))
    with pytest.raises(ValueError, match="prompt: got 1 sequences of 0 rows"):
        model.read(tiny.prompt([[]]), state)
    with pytest.raises(ValueError, match="prompt: got a tensor together with a state, needs a MixedPrompt"):
        model.generate(torch.tensor([[1, 2]]), state=state)
    with pytest.raises(ValueError, match="state: is empty, needs a prompt"):
        model.generate(state=GenerationState(), max_new_tokens=1)
    for option in (
        {"num_beams": 2},
        {"num_return_sequences": 3},
        {"use_cache": False},
        {"past_key_values": state.cache},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(option))}: got .* state"):
            model.generate(state=state, max_new_tokens=1, **option)
    before = snapshot(state)
    with pytest.raises(PromptTooLongError, match="prompt: 250 rows after the 18 .* are 12 over .* 256; 238 would fit"):
        model.read(tiny.prompt([[("text", 250)]]), state)
    unchanged(state, before)
    model.read(tiny.prompt([[("text", 238)]]), state)
    with pytest.raises(PromptTooLongError, match="4 rows after the 256 .* are 4 over .* 256; 0 would fit"):
        model.expand(state, 0)


@pytest.mark.parametrize("decoder", ["llama", "mistral"])
def test_an_answer_that_exceeds_the_window_is_refused(decoder):
    model = tiny.refrag(decoder)
    state = model.read(tiny.prompt([[("text", 250)]]))
    before = snapshot(state)
    for options, new in ((dict(max_new_tokens=7), 7), (dict(max_length=258), 8), ({}, 20)):
        with pytest.raises(PromptTooLongError, match=rf"max_new_tokens: {new} tokens .* 250 rows .* 256; 6 would fit"):
            model.generate(state=state, do_sample=False, **options)
        unchanged(state, before)
    with pytest.raises(PromptTooLongError, match="max_new_tokens: 3 tokens after the 254 rows"):
        model.generate(tiny.prompt([[("text", 4)]]), state=state, max_new_tokens=3)
    unchanged(state, before)
    assert model.generate(state=state, max_new_tokens=6, do_sample=False).shape == (1, 6)


def test_text_prompts_are_on_the_cpu_with_any_default_device():
    with torch.device("meta"):
        prompt = text_prompt([5, 6, 7])
    assert prompt.token_ids.tolist() == [5, 6, 7] and prompt.position_ids.tolist() == [0, 1, 2]
    assert prompt.slot_of_row.tolist() == [-1, -1, -1] and prompt.passage_of_span.tolist() == [-1]
    assert prompt.encoder_input.token_ids.device.type == "cpu"
