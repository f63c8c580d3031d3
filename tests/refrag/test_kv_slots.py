"""Key/value slots: prompts whose chunks are rows of the decoder's own keys and values."""

import copy

import pytest
import torch
from refrag import PassageCache
from refrag.model.inputs import Chunk
from refrag.model.passage_reading import read_passages
from refrag.model.passage_rows import SlotRule
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig

from tests.refrag import tiny
from tests.refrag.kv_prompts import AFTER, BEFORE, A, B, C, K, by_hand, model_of, packed, plain_of, tokens
from tests.refrag.test_passage_cache import rows_read
from tests.support.accuracy import relative_error

BOUND = 1e-5


@pytest.fixture(autouse=True)
def wide_windows(monkeypatch):
    for name in ("mistral", "gemma3"):
        config = copy.deepcopy(tiny.DECODERS[name])
        config.sliding_window = 128
        monkeypatch.setitem(tiny.DECODERS, name, config)


OTHERS = {  # softcaps; sinks and YaRN
    "gemma2": Gemma2Config(**tiny._DECODER, query_pre_attn_scalar=16, sliding_window=128),
    "gpt_oss": GptOssConfig(
        **tiny._DECODER, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 3
    ),
}


def other_decoder(name):
    torch.manual_seed(1)
    decoder = AutoModelForCausalLM.from_config(copy.deepcopy(OTHERS[name]), attn_implementation="eager").eval()
    tiny._spread(decoder)
    return decoder


@pytest.mark.parametrize("name", [*tiny.DECODERS, *OTHERS])
@pytest.mark.parametrize("position_ids", ["parallel", "original"])
def test_everything_kept_equals_full_text(name, position_ids, monkeypatch):
    """With as many rows as tokens, the logits are those of the plain cache on the passages' text."""
    if name in OTHERS:
        monkeypatch.setattr(tiny, "decoder", other_decoder)
    model = model_of(name, SlotRule(rows=K), position_ids=position_ids)
    plain = plain_of(model)
    before = [BEFORE] if position_ids == "parallel" else []  # else passages after the first are at a distance from it
    for order in ((A, B, C), (C, A), (B, C, A)):
        prompt = packed(model, [*before, *order, AFTER])
        text = packed(plain, [*before, *order, AFTER], all_text=True)
        expected = PassageCache(plain).read(text).last_logits()
        assert relative_error(model.read(prompt).last_logits(), expected) < BOUND


@pytest.mark.parametrize("rule", ["received", "distinct"])
@pytest.mark.parametrize(("rows", "whole"), [(1, 0), (3, 0), (1, 2)])
def test_slots_equal_rows_chosen_by_hand(rule, rows, whole):
    chosen = SlotRule(rows, rule, whole)
    model = model_of(rule=chosen)
    for parts, expanded in (([BEFORE, A, B, C, AFTER], ()), ([BEFORE, C, tokens(3, 9), A, AFTER], (1, 4))):
        state = model.read(packed(model, parts, expanded=expanded))
        assert relative_error(state.last_logits(), by_hand(model, parts, chosen, expanded)[0]) < BOUND
        other_rule = "distinct" if rule == "received" else "received"
        other, _ = by_hand(model, parts, SlotRule(rows, other_rule, whole), expanded)
        assert relative_error(state.last_logits(), other) > 1e-3, "the rules choose the same rows: nothing is tested"


def test_passages_in_any_order_come_from_the_cache():
    model = model_of(rule=SlotRule(2))
    cache, counts = PassageCache(model), rows_read(model)
    for order, misses in (((A, B), 2), ((B, A), 0), ((C, B, A), 1), ((A, C), 0)):
        prompt = packed(model, [BEFORE, *order, AFTER])
        expected = model.read(prompt).last_logits()
        before = cache.misses
        counts.clear()
        assert relative_error(cache.read(prompt).last_logits(), expected) < BOUND
        assert cache.misses - before == misses
        if not misses:
            assert sum(counts) == len(BEFORE) + len(AFTER), "only the text may be read"
    assert (cache.hits, cache.misses, len(cache)) == (6, 3, 3)
    rows = {id(part): sum(min(2, len(chunk.token_ids)) for chunk in part) for part in (A, B, C)}
    assert cache.nbytes == sum(rows.values()) * 3 * 2 * (2 * 16 * 4 + 4)  # layers, heads, keys and values, row numbers
    other = packed(model, [BEFORE[:-1], A, AFTER])
    cache.read(other)
    assert cache.misses == 4, "a passage behind another text was taken"


@pytest.mark.parametrize("full", [False, True])
def test_an_expanded_chunk_is_gathered_or_read_again(full):
    model = model_of()
    cache, counts = PassageCache(model, full=full), rows_read(model)
    cache.read(packed(model, [BEFORE, A, B, AFTER]))
    counts.clear()
    prompt = packed(model, [BEFORE, B, A, AFTER], expanded={0, 3})
    state = cache.read(prompt)
    text = len(BEFORE) + len(AFTER)
    assert sum(counts) == (text if full else text + len(BEFORE) + 15)
    assert relative_error(state.last_logits(), by_hand(model, [BEFORE, B, A, AFTER], SlotRule(), {0, 3})[0]) < BOUND


@pytest.mark.parametrize("full", [False, True])
def test_expand_puts_rows_back(full):
    model = model_of()
    prompt = packed(model, [BEFORE, A, B, AFTER])
    state = PassageCache(model, full=full).read(prompt)
    model.expand(state, 1)
    expected = model.read(packed(model, [BEFORE, A, B, AFTER], expanded={1}))
    assert relative_error(state.last_logits(), expected.last_logits()) < BOUND
    assert state.rows == expected.rows and state.next_position == expected.next_position
    model.expand(state, "p2")
    assert relative_error(state.last_logits(), by_hand(model, [BEFORE, A, B, AFTER], SlotRule(), {1, 3, 4})[0]) < BOUND
    model.expand(state, A[0])
    # Text that is appended afterwards, generated or read, attends to all rows.
    got = model.generate(state=state, max_new_tokens=5, do_sample=False)
    whole = model.read(packed(model, [BEFORE, A, B, AFTER], expanded={0, 1, 3, 4}))
    assert torch.equal(got, model.generate(state=whole, max_new_tokens=5, do_sample=False))
    with pytest.raises(ValueError, match="chunk: got 5, needs 0 to 4"):
        model.expand(state, 5)


def test_expand_after_generating_reads_the_answer_again():
    model = model_of()
    state = model.read(packed(model, [BEFORE, A, B, AFTER]))
    answer = model.generate(state=state, max_new_tokens=4, do_sample=False)[0].tolist()
    model.expand(state, 0)
    expected = model.read(packed(model, [BEFORE, A, B, [*AFTER, *answer]], expanded={0}))
    assert relative_error(state.last_logits(), expected.last_logits()) < BOUND
    assert (state.rows, state.next_position, state.unread) == (expected.rows, expected.next_position, [])


def test_a_batch_of_sequences():
    """Sequences of different lengths generate what each generates alone, with one row or beams."""
    model = model_of()
    sequences = [[BEFORE, A, B, AFTER], [tokens(2, 11), tokens(3, 12)], [BEFORE, C, tokens(2, 13), A, AFTER + AFTER]]
    prompt = packed(model, *sequences, expanded={1, 6})
    together = model.generate(PassageCache(model).attach(prompt), max_new_tokens=6, do_sample=False)
    for index, (parts, expanded) in enumerate(zip(sequences, ({1}, (), {1}))):
        alone = packed(model, parts, expanded=expanded)
        expected = model.generate(state=model.read(alone), max_new_tokens=6, do_sample=False)
        assert torch.equal(together[index : index + 1], expected)
        assert torch.equal(model.generate(alone, max_new_tokens=6, do_sample=False), expected)
        beams = dict(max_new_tokens=5, num_beams=3, do_sample=False)
        assert torch.equal(model.generate(prompt, **beams)[index], model.generate(alone, **beams)[0])


def test_a_conversation():
    """Passages appended to a state are read behind its beginning, also after generated tokens."""
    model = model_of(rule=SlotRule(2))
    state = model.read(packed(model, [BEFORE, A, AFTER]))
    answer = model.generate(state=state, max_new_tokens=3, do_sample=False)[0].tolist()
    model.read(packed(model, [C, tokens(4, 14)]), state)
    expected = model.read(packed(model, [BEFORE, A, [*AFTER, *answer], C, tokens(4, 14)]))
    assert relative_error(state.last_logits(), expected.last_logits()) < BOUND
    model.expand(state, 4)
    model.expand(expected, 4)
    assert relative_error(state.last_logits(), expected.last_logits()) < BOUND
    state = model.read(packed(model, [BEFORE]))
    model.read(packed(model, [A, AFTER]), state)
    expected = model.read(packed(model, [BEFORE, A, AFTER]))
    assert relative_error(state.last_logits(), expected.last_logits()) < BOUND


def test_streaming():
    model = model_of()
    seen = []

    class Streamer:
        def put(self, value):
            seen.extend(value.flatten().tolist())

        def end(self):
            seen.append("end")

    prompt = packed(model, [BEFORE, A, AFTER])
    answer = model.generate(prompt, max_new_tokens=4, do_sample=False, streamer=Streamer())
    assert seen == [*answer[0].tolist(), "end"]


def test_an_error_leaves_the_state_unchanged(monkeypatch):
    model = model_of()
    state = model.read(packed(model, [BEFORE, A, AFTER]))
    before = (state.rows, state.next_position, state.sequence, state.last_logits())

    def fail(*arguments, **options):
        raise RuntimeError("interrupted")

    monkeypatch.setattr(type(state), "note_prompt", fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        model.read(packed(model, [B, AFTER]), state)
    monkeypatch.undo()
    assert (state.rows, state.next_position, state.sequence, state.last_logits()) == before
    assert state.cache.get_seq_length() == state.rows


def test_batches_of_passages_equal_one():
    model = model_of()
    one = read_passages(model, model.key_rotation, [A, B, C], BEFORE, SlotRule(), full=True)
    several = read_passages(model, model.key_rotation, [A, B, C], BEFORE, SlotRule(), full=True, batch_rows=15)
    for got, expected in zip(several, one, strict=True):
        for mine, theirs in ((got.slots, expected.slots), (got.full, expected.full)):
            assert relative_error(mine.keys, theirs.keys) < BOUND and relative_error(mine.values, theirs.values) < BOUND
            assert torch.equal(mine.rows, theirs.rows) and mine.keep == theirs.keep
    assert read_passages(model, model.key_rotation, [], BEFORE, SlotRule()) == []
    with pytest.raises(ValueError, match="passage 'p9': has no chunks or one without tokens"):
        read_passages(model, model.key_rotation, [[Chunk("", (), "p9")]], BEFORE, SlotRule())


def test_bfloat16():
    model = model_of(rule=SlotRule(K))
    low = copy.deepcopy(model).bfloat16()
    prompt = packed(model, [BEFORE, A, B, AFTER])
    exact = model.read(prompt).last_logits()
    plain = plain_of(low)
    text = packed(plain, [BEFORE, A, B, AFTER], all_text=True)
    bound = 1.5 * relative_error(PassageCache(plain).read(text).last_logits(), exact) + 5e-3
    assert relative_error(low.read(prompt).last_logits(), exact) < bound


def test_the_cache_tells_rules_apart():
    model = model_of(rule=SlotRule(1, "received"))
    cache = PassageCache(model)
    cache.read(packed(model, [BEFORE, A, AFTER]))
    model.config.use_kv_slots(SlotRule(1, "distinct"))
    prompt = packed(model, [BEFORE, A, AFTER])
    assert torch.equal(cache.read(prompt).last_logits(), model.read(prompt).last_logits())
    assert (cache.hits, cache.misses) == (0, 2)
