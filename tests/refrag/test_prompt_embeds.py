"""Prompt embeddings for serving stacks: their contents, serialization, and content key."""

import base64
import dataclasses
import io
import json

import pytest
import torch
from refrag import Passage, RefragProcessor
from refrag.integrations.prompt_embeds import build, mixed_cache_key

from tests.refrag import tiny

TEXT = "The bridge of Orla was built in 1871 by masons from the north. It has seven arches of red stone."
QUESTION = "When was the bridge built?"


@pytest.fixture(scope="module")
def processor(tokenizer, encoder_tokenizer):
    return RefragProcessor(tokenizer, encoder_tokenizer, k=4)


def test_rows_are_those_that_the_decoder_reads():
    model = tiny.refrag("gemma3")
    prompt = tiny.prompt(tiny.MIXED)
    embeds = model.embed(prompt)
    table = model.get_input_embeddings()
    built = build(model, prompt)
    assert [len(one.embeds) for one in built] == [sum(lengths) for lengths in prompt.layout.lengths()]
    assert torch.equal(torch.cat([one.embeds for one in built]), embeds)
    for one in built:
        mask = torch.tensor(one.is_token)
        assert mask.any() and not mask.all()
        # vLLM may read a text row from either place.
        assert torch.equal(one.embeds[mask], table(torch.tensor(one.token_ids)[mask]))


@pytest.mark.parametrize("index", [0, 1])
def test_a_plain_decoder_generates_the_same_from_them(index):
    model = tiny.refrag("llama")
    prompt = tiny.prompt(tiny.MIXED)
    given = build(model, prompt)[index].for_vllm()
    assert set(given) == {"prompt_embeds", "prompt_token_ids", "prompt_is_token_ids"}
    ours = model.generate(prompt, max_new_tokens=8, do_sample=False)[index]
    theirs = tiny.decoder("llama").generate(
        inputs_embeds=given["prompt_embeds"][None],
        attention_mask=torch.ones(1, len(given["prompt_token_ids"])),
        max_new_tokens=8,
        do_sample=False,
    )[0]
    assert ours.tolist() == theirs.tolist()


def test_chunk_embeds_are_taken():
    model = tiny.refrag("llama")
    prompt = tiny.prompt(tiny.MIXED)
    rows = torch.randn(len(prompt.chunks), 32)
    built = build(model, prompt, rows)
    assert torch.equal(torch.cat([one.embeds for one in built]), model.embed(prompt, rows))
    assert [one.key for one in built] == mixed_cache_key(prompt, chunk_embeds=rows)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_what_the_server_of_vllm_loads(dtype):
    model = tiny.refrag("llama")
    one = build(model, tiny.prompt(tiny.MIXED), dtype=dtype)[1]
    sent = one.for_vllm_server()
    # As in vllm/renderers/embed_utils.py.
    loaded = torch.load(io.BytesIO(base64.b64decode(sent, validate=True)), weights_only=True)
    assert torch.equal(loaded, one.embeds) and loaded.dtype == (dtype or torch.float32)
    assert loaded.dim() == 2 and loaded.is_contiguous()
    # The file's overhead is below 2 KB, so the other prompt's rows are not included.
    assert len(base64.b64decode(sent)) < one.embeds.nbytes + 2048


def test_what_sglang_takes_is_json():
    one = build(tiny.refrag("llama"), tiny.prompt(tiny.MIXED))[0]
    rows = json.loads(json.dumps(one.for_sglang()))["input_embeds"]
    assert torch.equal(torch.tensor(rows), one.embeds)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_overrides_written_over_the_text_s_embeddings_are_the_rows(name):
    model = tiny.refrag(name)
    for one in build(model, tiny.prompt(tiny.MIXED)):
        ids, embeds, positions = one.overrides()
        rows = model.get_input_embeddings()(torch.tensor(ids)).clone()  # as in SGLang 0.5.23's model_runner.py
        rows[torch.tensor(positions)] = embeds
        assert len(embeds) == len(positions) == one.is_token.count(False) and torch.equal(rows, one.embeds)


def test_overrides_refuse():
    with pytest.raises(ValueError, match="model_type: got 'gemma', needs another"):
        build(tiny.refrag("gemma"), tiny.prompt(tiny.MIXED))[0].overrides()
    with pytest.raises(ValueError, match="overrides: the prompt has no slot"):
        build(tiny.refrag("llama"), tiny.prompt([[("text", 3)]]))[0].overrides()


def test_a_prompt_of_text_alone_and_one_of_slots_alone():
    model = tiny.refrag("llama")
    text, slots = build(model, tiny.prompt([[("text", 3)], [("slot", 0), ("slot", 0)]]))
    assert text.is_token == [True] * 3 and slots.is_token == [False] * 2 and slots.token_ids == [0, 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_mask": "passages"}, "decoder_mask: got 'passages', needs 'full'"),
        ({"position_ids": "original"}, "position_ids: got 'original', needs 'contiguous'"),
    ],
)
def test_refuses_a_model_that_no_server_computes(fields, message):
    with pytest.raises(ValueError, match=message):
        build(tiny.refrag("llama", **fields), tiny.prompt(tiny.MIXED))


def test_refuses():
    model = tiny.refrag("llama")
    prompt = tiny.prompt(tiny.MIXED)
    with pytest.raises(ValueError, match="dtype: got torch.int64, needs a floating-point type"):
        build(model, prompt, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"chunk_embeds: got shape \[3, 32\], needs \[8, d_enc\]"):
        build(model, prompt, torch.zeros(3, 32))
    with pytest.raises(ValueError, match="prompt: sequence 1 is empty"):
        build(model, tiny.prompt([[("text", 2)], []]))
    with pytest.raises(ValueError, match="model_type: got 'gemma', needs another"):
        build(tiny.refrag("gemma"), prompt)[0].for_sglang()


def test_equal_prompts_have_equal_keys(processor):
    parts = ["Read this. ", Passage(TEXT), QUESTION]
    (key,) = mixed_cache_key(processor(parts, expand={1}))
    assert len(key) == 32 and int(key, 16) >= 0
    assert mixed_cache_key(processor(parts, expand={1})) == [key]
    # Alone or in a batch, and with another passage's id or its text's object.
    batch = processor([[QUESTION], ["Read this. ", Passage(TEXT, id="a.txt"), QUESTION]], expand={1})
    assert mixed_cache_key(batch)[1] == key


def test_the_key_stays_what_it_is():
    # Caches outlive processes and releases, so the key must only change intentionally.
    assert mixed_cache_key(tiny.prompt(tiny.MIXED), name="tiny") == [
        "3f39885aaf6d1949e3c522f0dd258abc",
        "05ebc4205241a869fa0278c2f0b4544c",
    ]


def variants(processor):
    """Yield prompts that each differ in one respect."""
    other = TEXT.replace("1871", "1872")
    yield "as it is", processor([Passage(TEXT), QUESTION])
    yield "a chunk's content", processor([Passage(other), QUESTION])
    yield "chunk 1 expanded", processor([Passage(TEXT), QUESTION], expand={1})
    yield "chunk 2 expanded", processor([Passage(TEXT), QUESTION], expand={2})
    yield "both expanded", processor([Passage(TEXT), QUESTION], expand={1, 2})
    yield "expanded, other content", processor([Passage(other), QUESTION], expand={1, 2})
    yield "all expanded", processor([Passage(TEXT), QUESTION], expand=1.0)
    yield "the text of it", processor([TEXT, QUESTION])
    yield "the question", processor([Passage(TEXT), "Who built the bridge?"])
    yield "the order", processor([QUESTION, Passage(TEXT)])
    yield "twice", processor([Passage(TEXT), Passage(TEXT), QUESTION])


def test_whatever_differs_has_another_key(processor):
    prompts = dict(variants(processor))
    keys = {what: mixed_cache_key(prompt)[0] for what, prompt in prompts.items()}
    assert len(set(keys.values())) == len(keys)
    named = {what: mixed_cache_key(prompt, name="b")[0] for what, prompt in prompts.items()}
    assert len(set(keys.values()) | set(named.values())) == 2 * len(keys)


def test_positions_passages_and_the_encoder_are_in_the_key():
    prompt = tiny.prompt(tiny.MIXED)
    others = [
        dataclasses.replace(prompt, position_ids=prompt.position_ids * 2),
        dataclasses.replace(prompt, passage_of_span=prompt.passage_of_span + 1),
        dataclasses.replace(
            prompt,
            encoder_input=dataclasses.replace(prompt.encoder_input, token_ids=prompt.encoder_input.token_ids + 1),
        ),
    ]
    keys = [mixed_cache_key(one) for one in [prompt, *others]]
    assert all(len({pair[sequence] for pair in keys}) == 4 for sequence in range(2))


def test_an_expanded_chunk_s_embedding_is_not_in_the_key():
    prompt = tiny.prompt(tiny.MIXED)
    rows = torch.randn(len(prompt.chunks), 32)
    keys = mixed_cache_key(prompt, chunk_embeds=rows)
    assert keys != mixed_cache_key(prompt)
    changed = rows.clone()
    changed[sorted(prompt.expanded)] += 1
    assert mixed_cache_key(prompt, chunk_embeds=changed) == keys
    changed[0, 31] += 1e-6  # chunk 0 is a slot of sequence 0
    first, second = mixed_cache_key(prompt, chunk_embeds=changed)
    assert first != keys[0] and second == keys[1]
    assert mixed_cache_key(prompt, chunk_embeds=rows.bfloat16()) != keys


def test_rows_of_text_and_slots_never_run_together():
    # The same tokens in the same number of rows, once as text and once as the encoder's input of a slot.
    text, slot = tiny.prompt([[("text", 1)]]), tiny.prompt([[("slot", -1)]])
    slot = dataclasses.replace(
        slot, encoder_input=dataclasses.replace(slot.encoder_input, token_ids=slot.encoder_input.token_ids * 0)
    )
    assert mixed_cache_key(dataclasses.replace(text, token_ids=text.token_ids * 0)) != mixed_cache_key(slot)
