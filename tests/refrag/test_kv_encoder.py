"""KVEncoder and the processor: prompts from text and from a KVStore, with a real tokenizer."""

import dataclasses

import pytest
import torch
from refrag import (
    ChunkStore,
    CosineSelector,
    Fingerprint,
    KVEncoder,
    KVStore,
    Passage,
    PromptTooLongError,
    RefragForCausalLM,
    RefragProcessor,
    SlotRule,
    StoreError,
    TextEmbedder,
)
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.refrag import tiny
from tests.support.accuracy import relative_error

BOUND = 1e-5
BRIDGE = Passage("The bridge of Orla was built in 1871 by Ada Lind. It is 40 m long and 6 m wide.", "bridge")
BREAD = Passage("Bread needs flour, water, salt and yeast.\n", "bread")
RAIN = Passage("It rained all day.", "rain")
QUESTION = "When was the bridge built?"
RULE = SlotRule(rows=1, whole=1)


@pytest.fixture(scope="module")
def model(tokenizer, encoder_tokenizer):
    torch.manual_seed(1)
    config = LlamaConfig(**{**tiny._DECODER, "vocab_size": len(tokenizer), "num_hidden_layers": 2})
    decoder = AutoModelForCausalLM.from_config(config).eval()
    tiny._spread(decoder)
    bert = {**tiny._ENCODER, "vocab_size": len(encoder_tokenizer)}
    encoder = tiny.AutoModel.from_config(tiny.BertConfig(**bert)).eval()
    return RefragForCausalLM.from_parts(encoder, decoder, 8, preset="kv", slot_whole=1).eval()


@pytest.fixture(scope="module")
def processor(model, tokenizer, encoder_tokenizer):
    return RefragProcessor.from_config(model.config, tokenizer, encoder_tokenizer)


@pytest.fixture
def encoder(model, processor):
    return KVEncoder(model, processor, full=True)


@pytest.fixture
def store(tmp_path, encoder):
    store = KVStore.create(tmp_path / "store", encoder.fingerprint, torch.float32, full=True)
    assert encoder.fill(store, [BRIDGE, BREAD, RAIN]) == (3, 0, 0)
    return store


def asked(processor, *passages, question=QUESTION):
    return processor.apply_chat_template([{"role": "user", "content": [*passages, question]}])


def test_prompts_keep_the_positions_of_all_tokens(processor, tokenizer):
    prompt = processor(["Read: ", BRIDGE, "\n", BREAD, QUESTION], expand={1})
    sizes = [len(chunk.token_ids) for chunk in prompt.chunks]
    before, after = (len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("Read: ", QUESTION))
    passages = prompt.passage_of_span.tolist()
    assert passages == [-1, 0, 0, 0, 0, -1, 1, 1, -1] and sizes[1] == 8
    # The last chunk of each passage stays whole, by the rule.
    assert prompt.expanded == {1, 3, 5}
    assert prompt.layout.lengths() == [[before, 1, 8, 1, sizes[3], 1, 1, sizes[5], after]]
    assert int(prompt.position_ids[-1]) == before + sum(sizes) + 1 + after - 1
    assert prompt.kv_slots == RULE and prompt.chunk_embeds is None and len(prompt.encoder_input.token_ids) == 0


def test_a_prompt_from_the_store_equals_one_from_text(model, processor, store):
    for passages, expand in (([BRIDGE, BREAD], ()), ([RAIN, BREAD, BRIDGE], {0, 3})):
        expected = model.read(processor(asked(processor, *passages), expand=expand))
        by_id = [Passage(id=passage.id) for passage in passages]
        for own in (passages, by_id):
            prompt = processor(asked(processor, *own), expand=expand, store=store)
            assert len(prompt.passages) == len(passages)
            assert relative_error(model.read(prompt).last_logits(), expected.last_logits()) < BOUND


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float8_e4m3fn, 0.1)])
def test_stores_in_fewer_bits(tmp_path, model, processor, encoder, dtype, bound):
    store = KVStore.create(tmp_path / "low", encoder.fingerprint, dtype, full=True)
    encoder.fill(store, [BRIDGE, BREAD])
    prompt = processor(asked(processor, BRIDGE, BREAD), expand={0}, store=store)
    exact = model.read(processor(asked(processor, BRIDGE, BREAD), expand={0}))
    assert 1e-6 < relative_error(model.read(prompt).last_logits(), exact.last_logits()) < bound


def test_nothing_is_read_from_the_store_twice(model, processor, store, encoder, monkeypatch):
    monkeypatch.setattr("refrag.model.slot_prefill.read_passages", lambda *_, **__: pytest.fail("read a passage"))
    state = model.read(processor(asked(processor, BRIDGE, BREAD), store=store))
    model.expand(state, 0)
    model.generate(state=state, max_new_tokens=2, do_sample=False)
    monkeypatch.setattr("refrag.encoding.kv_encoder.read_passages", lambda *_, **__: pytest.fail("read a passage"))
    assert encoder.fill(store, [BRIDGE, RAIN], shard_passages=1) == (0, 2, 0)


def test_without_full_rows_an_expanded_chunk_is_read_again(tmp_path, model, processor):
    encoder = KVEncoder(model, processor)
    store = KVStore.create(tmp_path / "slots", encoder.fingerprint, torch.float32)
    encoder.fill(store, [BRIDGE, BREAD])
    prompt = processor(asked(processor, BRIDGE, BREAD), expand={0}, store=store)
    expected = model.read(processor(asked(processor, BRIDGE, BREAD), expand={0}))
    assert relative_error(model.read(prompt).last_logits(), expected.last_logits()) < BOUND


def test_cosines_pick_chunks_with_a_store(model, processor, store, encoder_tokenizer):
    selector = CosineSelector(TextEmbedder(model, encoder_tokenizer))
    with_store = processor(asked(processor, BRIDGE, BREAD), expand_count=2, selector=selector, store=store)
    assert with_store.expanded == processor(asked(processor, BRIDGE, BREAD), expand_count=2, selector=selector).expanded


def test_a_saved_processor_keeps_its_slots(tmp_path, processor):
    processor.save_pretrained(tmp_path)
    again = RefragProcessor.from_pretrained(tmp_path)
    assert again.kv_slots == RULE and again.position_ids == "original"


def test_a_first_chunk_that_is_expanded_has_the_start_token_too(processor):
    assert processor.tokenizer.bos_token_id is not None
    for expand in ((), {0}):
        prompt = processor([BRIDGE, QUESTION], expand=expand)
        assert prompt.token_ids[0] == processor.tokenizer.bos_token_id and prompt.passage_of_span[0] == -1
    assert processor.shared_text([BRIDGE, QUESTION]) == [processor.tokenizer.bos_token_id]


def test_refusals(tmp_path, model, processor, store, tokenizer, encoder_tokenizer):
    with pytest.raises(StoreError, match="shared_text: holds passages read behind .*user.*, got prompt 0 with 'Read: "):
        processor(["Read: ", BRIDGE, QUESTION], store=store)
    other = RefragProcessor(tokenizer, encoder_tokenizer, 8, position_ids="original", kv_slots=SlotRule(2))
    with pytest.raises(StoreError, match=r"slots: holds SlotRule\(rows=1, .*whole=1\), got .*SlotRule\(rows=2"):
        other(asked(other, BRIDGE), store=store)
    with pytest.raises(StoreError, match="chunker: holds fixed, k = 8, got a processor of fixed, k = 4"):
        RefragProcessor(tokenizer, encoder_tokenizer, 4, position_ids="original", kv_slots=RULE)(BRIDGE, store=store)
    plain = RefragProcessor(tokenizer, encoder_tokenizer, 8)
    with pytest.raises(StoreError, match=r"slots: holds SlotRule.*, got a processor of embedding slots"):
        plain(asked(plain, BRIDGE), store=store)
    fingerprint = Fingerprint("tiny", "r1", "t1", "t2", store.fingerprint.chunker, "first", True, 4)
    embeds = ChunkStore.create(tmp_path / "embeds", fingerprint)
    with pytest.raises(StoreError, match="slots: holds embedding slots, got a processor of SlotRule"):
        processor(asked(processor, BRIDGE), store=embeds)
    with pytest.raises(ValueError, match=r"processor: got slots None, needs the model's key/value slots, SlotRule"):
        KVEncoder(model, plain)
    with pytest.raises(ValueError, match="kv_slots: got 9 rows, needs 1 to k = 8"):
        RefragProcessor(tokenizer, encoder_tokenizer, 8, position_ids="original", kv_slots=SlotRule(9))
    with pytest.raises(ValueError, match="position_ids: got 'contiguous' beside kv_slots"):
        RefragProcessor(tokenizer, encoder_tokenizer, 8, kv_slots=RULE)
    with pytest.raises(ValueError, match="batch_tokens: got 0"):
        KVEncoder(model, processor, batch_tokens=0)
    with pytest.raises(ValueError, match="model: is in training mode"):
        KVEncoder(model.train(), processor)
    model.eval()
    encoder = KVEncoder(model, processor)
    with pytest.raises(ValueError, match="passage 'empty': has no text"):
        encoder.encode([Passage(" ", "empty")])
    with pytest.raises(PromptTooLongError, match="needs at most the 256 of the decoder's max_position_embeddings"):
        encoder.encode([Passage("word " * 300, "long")])
    with pytest.raises(PromptTooLongError, match="with key/value slots, all tokens count, so no k fits"):
        processor([Passage("word " * 300), QUESTION])
    with pytest.raises(StoreError, match="decoder: holds keys and values of"):
        store.require(dataclasses.replace(store.fingerprint, revision="other"))
