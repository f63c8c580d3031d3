"""Key/value slots: prompts, decoders, scores and configs that are refused by name."""

from dataclasses import replace

import pytest
import torch
from refrag import PassageCache, PromptTooLongError, RefragConfig, RefragForCausalLM
from refrag.model.passage_reading import read_passages
from refrag.model.passage_rows import PassageEntry, SlotRule
from refrag.model.prefill_graph import PrefillGraph
from transformers import GPT2Config, GPT2LMHeadModel

from tests.refrag import tiny
from tests.refrag.kv_prompts import AFTER, BEFORE, A, C, model_of, packed, tokens


def test_refuses_prompts():
    model, plain = model_of(), tiny.refrag(decoder_mask="passages", position_ids="original")
    good = packed(model, [BEFORE, A, AFTER])
    read = PassageCache(model).attach(good).passages
    for prompt, message in (
        (packed(model, [BEFORE, A]), "sequence 0 ends with a passage or is empty, needs text after"),
        (packed(plain, [BEFORE, A, AFTER]), r"got embedding slots, needs 1 row of each chunk, the most received"),
        (replace(good, kv_slots=SlotRule(2)), r"got 2 rows of each chunk, .* needs 1 row of"),
        (replace(good, passages=read + read), "passages: got 2 entries, needs 1"),
        (replace(packed(model, [BEFORE[:-1], A, AFTER]), passages=read), "entry 0 was read behind 5 tokens .* with 4"),
        (replace(packed(model, [BEFORE, C, AFTER]), passages=read), r"got \[4, 4, 4, 3\] tokens, needs \[4, 4, 2\]"),
        (replace(good, position_ids=torch.arange(14)), "position_ids: got 6 for the last row of a chunk .* needs 9"),
    ):
        with pytest.raises(ValueError, match=message):
            model.read(prompt)
        with pytest.raises(ValueError, match=message):
            model.generate(prompt, max_new_tokens=1)
    with pytest.raises(ValueError, match="prompt: got 1 row of each chunk, .*, needs embedding slots"):
        plain.read(good)
    with pytest.raises(ValueError, match="chunk_embeds: got a tensor, needs None with key/value slots"):
        model.read(good, chunk_embeds=torch.zeros(3, 32))
    with pytest.raises(ValueError, match=r"prompt: got key/value slots, .* needs read\(\) or generate\(\)"):
        model(prompt=good)
    with pytest.raises(ValueError, match="prompt: got key/value slots, needs embedding slots: a graph"):
        PrefillGraph(model, rows=64, chunks=8).read(good)
    with pytest.raises(ValueError, match="output_hidden_states: got True"):
        model.generate(good, max_new_tokens=1, output_hidden_states=True)
    with pytest.raises(ValueError, match="prompt: got 2 sequences, needs one"):
        model.read(packed(model, [BEFORE, A, AFTER], [AFTER]))
    with pytest.raises(ValueError, match="full: got True, needs a model with slots='kv'"):
        PassageCache(plain, full=True)
    with pytest.raises(ValueError, match="prompt: got embedding slots, needs key/value slots: use read"):
        PassageCache(plain).attach(packed(plain, [BEFORE, A, AFTER]))
    mixed = plain.read(packed(plain, [BEFORE, A, AFTER]))
    with pytest.raises(ValueError, match="state: has read embedding slots"):
        model.read(good, mixed)


def test_refuses_rows_of_another_shape():
    model, other = model_of(), model_of()
    prompt = packed(model, [BEFORE, A, AFTER])
    (entry,) = PassageCache(model).attach(prompt).passages
    fewer = replace(entry.slots, keys=entry.slots.keys[1:], values=entry.slots.values[1:], rows=entry.slots.rows[1:])
    with pytest.raises(ValueError, match=r"entry 0 has \(2, 2, 16\) layers, .* needs the decoder's, \(3, 2, 16\)"):
        other.read(replace(prompt, passages=(PassageEntry(fewer),)))
    for fields, message in (
        ({"keys": entry.slots.keys[:, :, 1:]}, r"keys: got shape \[3, 2, 2, 16\], needs \[L, H, 3, D\]"),
        ({"keep": (1, 2)}, "keys: got shape .* the rows of 3 chunks"),
        ({"values": entry.slots.values[..., :8]}, r"values: got shape \[3, 2, 3, 8\], needs \[3, 2, 3, 16\]"),
        ({"rows": entry.slots.rows[:1]}, r"rows: got shape \[1, 2, 3\], needs \[3, 2, 3\]"),
        ({"key_scale": torch.ones(3, 2)}, r"key_scale: got shape \[3, 2\], needs \[3, 2, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(entry.slots, **fields)


def test_refuses_decoders():
    model = model_of("mistral")
    model.config.text_config.sliding_window = 12
    with pytest.raises(ValueError, match="prompt: got 21 positions, needs at most the 12 of the decoder's sliding win"):
        model.read(packed(model, [BEFORE, A, AFTER]))
    with pytest.raises(ValueError, match="passage 'p1': got 15 rows .* at most the 12 of the decoder's sliding_window"):
        read_passages(model, model.key_rotation, [A], BEFORE, SlotRule())
    model = model_of("llama")
    with pytest.raises(PromptTooLongError, match="over the decoder's window of 256"):
        model.read(packed(model, [BEFORE, A, tokens(300, 1)]))
    bare = RefragForCausalLM.from_parts(
        tiny.encoder("bert"), GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=48, n_layer=1, n_head=2)), 4,
        preset="kv",
    )  # fmt: skip
    with pytest.raises(ValueError, match="decoder: got GPT2LMHeadModel, which has no rotary embedding"):
        bare.read(packed(bare, [BEFORE, A, AFTER]))


@pytest.mark.parametrize("rule", ["received", "distinct"])
def test_refuses_scores_that_are_not_finite(rule):
    model = model_of(rule=SlotRule(rule=rule))
    weight = model.decoder.model.layers[1].self_attn.k_proj.weight
    weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="scores: got NaN or inf in layer 1"):
        model.read(packed(model, [BEFORE, A, AFTER]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"slots": "rows"}, "slots: got 'rows', needs one of embedding, kv"),
        ({"slots": "kv"}, "decoder_mask: got 'full' with slots='kv', needs passages"),
        ({"slots": "kv", "decoder_mask": "passages"}, "position_ids: got 'contiguous' .* original or parallel"),
        ({"slot_rows": 17}, "slot_rows: got 17, needs 1 to the chunk_size of 16"),
        ({"slot_rows": 0}, "slot_rows: got 0"),
        ({"slot_rule": "norm"}, "slot_rule: got 'norm', needs one of received, distinct"),
        ({"slot_whole": -1}, "slot_whole: got -1"),
    ],
)
def test_refuses_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        RefragConfig(text_config=tiny.DECODERS["llama"], encoder_config=tiny.ENCODERS["bert"], **fields)


def test_configs():
    old = RefragConfig(text_config=tiny.DECODERS["llama"], encoder_config=tiny.ENCODERS["bert"])
    assert old.slots == "embedding" and old.kv_slots is None
    old.use_kv_slots(SlotRule(2, "distinct", 1))
    again = RefragConfig.from_dict(old.to_dict())
    assert again.kv_slots == SlotRule(2, "distinct", 1) and again.position_ids == "original"
    with pytest.raises(ValueError, match="rows: got 17, needs 1 to the chunk_size of 16"):
        old.use_kv_slots(SlotRule(17))
    for fields, message in (({"rows": 0}, "rows: got 0"), ({"rule": "x"}, "rule: got 'x'"), ({"whole": -1}, "whole")):
        with pytest.raises(ValueError, match=message):
            SlotRule(**fields)
