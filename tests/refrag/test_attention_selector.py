"""AttentionSelector: the chunks that the question's rows attend to most are expanded."""

import pytest
import torch
from refrag import AttentionSelector, KVEncoder, KVStore, PassageCache, RefragProcessor, SlotRule
from refrag.model.slot_scores import chunk_attention
from refrag.processing.selectors import by_name

from tests.refrag import tiny
from tests.refrag.kv_prompts import AFTER, BEFORE, A, B, C, by_hand, model_of, packed, tokens
from tests.refrag.test_kv_encoder import BREAD, BRIDGE, QUESTION, RAIN, asked
from tests.refrag.test_passage_cache import rows_read
from tests.support.accuracy import relative_error


@pytest.mark.parametrize("rule", [SlotRule(1, "received"), SlotRule(2, "distinct", 1)])
def test_scores_equal_those_by_hand(rule):
    model = model_of(rule=rule)
    first, second = [BEFORE, C, tokens(3, 9), A, AFTER], [BEFORE, B, AFTER]
    scores, prompt = chunk_attention(model, packed(model, first, second, expanded={1}))
    expected = torch.cat([by_hand(model, first, rule, {1})[1], by_hand(model, second, rule)[1]])
    assert scores.shape == (9,) and relative_error(scores, expected) < 1e-5
    assert len(prompt.passages) == 3 and all(entry.full is not None for entry in prompt.passages)
    scores, _ = chunk_attention(model, packed(model, [BEFORE, AFTER]))
    assert scores.shape == (0,)


def test_the_best_chunks_are_picked():
    model = model_of(rule=SlotRule(1, whole=1))
    prompt = packed(model, [BEFORE, C, A, AFTER], [BEFORE, B, AFTER])
    scores, _ = chunk_attention(model, prompt)
    picked, _ = AttentionSelector(model).pick(prompt, [3, 0])
    free = [0, 1, 2, 4, 5]  # chunks 3 and 6 are whole by the rule
    assert picked == set(sorted(free, key=lambda chunk: -scores[chunk])[:3])
    assert AttentionSelector(model).pick(prompt, [7, 2])[0] == {*free, 7}


@pytest.mark.parametrize("source", ["text", "cache", "store"])
def test_the_processor_expands_them(kv_model, kv_processor, source, tmp_path, monkeypatch):
    store, cache = None, None
    if source == "store":
        encoder = KVEncoder(kv_model, kv_processor, full=True)
        store = KVStore.create(tmp_path, encoder.fingerprint, torch.float32, full=True)
        encoder.fill(store, [BRIDGE, BREAD, RAIN])
    elif source == "cache":
        cache = PassageCache(kv_model, full=True)
        cache.read(kv_processor(asked(kv_processor, BRIDGE, BREAD, RAIN)))
    parts = [asked(kv_processor, BRIDGE, BREAD), asked(kv_processor, RAIN, BRIDGE)]
    selector = AttentionSelector(kv_model, cache)
    if source != "text":
        monkeypatch.setattr("refrag.model.slot_prefill.read_passages", lambda *_, **__: pytest.fail("read a passage"))
    prompt = kv_processor(parts, selector=selector, expand_count=[2, 1], store=store)
    compressed = kv_processor(parts, store=store)
    scores, attached = chunk_attention(kv_model, compressed if cache is None else cache.attach(compressed))
    whole, first = compressed.expanded, sum(compressed.chunks_per_sequence()[:1])
    for chunks, count in ((range(first), 2), (range(first, len(prompt.chunks)), 1)):
        best = sorted((chunk for chunk in chunks if chunk not in whole), key=lambda chunk: -scores[chunk])[:count]
        assert {chunk for chunk in chunks if chunk in prompt.expanded - whole} == set(best)
    # The rows of the passages came with the prompt: generating reads the text alone.
    counts = rows_read(kv_model)
    generated = kv_model.generate(prompt, max_new_tokens=1, do_sample=False)
    assert sum(counts) == int(
        (attached.passage_of_span < 0).repeat_interleave(attached.layout.chunk_offsets.diff()).sum()
    )
    again = kv_processor(parts, expand=prompt.expanded, store=store)
    if cache is not None:
        again = cache.attach(again)
    assert torch.equal(generated, kv_model.generate(again, max_new_tokens=1, do_sample=False))
    assert kv_processor(parts, selector=selector, expand=0.0, store=store).expanded == whole


def test_refuses(kv_model, kv_processor, tokenizer, encoder_tokenizer):
    plain = RefragProcessor(tokenizer, encoder_tokenizer, 8)
    selector = by_name("attention", model=kv_model)
    assert isinstance(selector, AttentionSelector)
    with pytest.raises(ValueError, match="model: got embedding slots, needs slots='kv'"):
        AttentionSelector(tiny.refrag())
    with pytest.raises(ValueError, match="model: got None, but the selector 'attention' needs it"):
        by_name("attention")
    with pytest.raises(ValueError, match="selector: got AttentionSelector, needs a processor with kv_slots"):
        plain([BRIDGE, QUESTION], selector=selector, expand=0.5)
    with pytest.raises(ValueError, match="selector: got AttentionSelector with begin=False"):
        kv_processor([BRIDGE, QUESTION], selector=selector, expand=0.5, begin=False)
    with pytest.raises(ValueError, match="expand: got None, AttentionSelector needs a fraction or a number"):
        kv_processor([BRIDGE, QUESTION], selector=selector)
    with pytest.raises(ValueError, match=r"expand: got \{1\} with AttentionSelector, needs a fraction"):
        kv_processor([BRIDGE, QUESTION], selector=selector, expand={1})
    with pytest.raises(ValueError, match="expand_count: got 99 for prompt 0, needs 0 to 4"):
        kv_processor([BRIDGE, QUESTION], selector=selector, expand_count=99)
    with pytest.raises(ValueError, match="expand_count: got 1 with expand = 0.5"):
        kv_processor([BRIDGE, QUESTION], selector=selector, expand=0.5, expand_count=1)
    with pytest.raises(TypeError, match="selector: AttentionSelector needs the whole prompt"):
        selector(QUESTION, [], 1)


def test_refuses_scores_that_are_not_finite():
    model = model_of()
    prompt = PassageCache(model, full=True).attach(packed(model, [BEFORE, A, AFTER]))
    model.decoder.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="scores: got NaN or inf for chunk 0, needs finite numbers"):
        AttentionSelector(model).pick(prompt, [1])
