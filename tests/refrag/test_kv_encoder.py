"""KVEncoder and the processor: prompts from text and from a KVStore, with a real tokenizer."""

import copy
import dataclasses

import pytest
import torch
from refrag import (
    ChunkStore,
    CosineSelector,
    ExpansionPolicy,
    Fingerprint,
    KVEncoder,
    KVStore,
    Passage,
    PassageCache,
    PolicySelector,
    PromptTooLongError,
    RefragForCausalLM,
    RefragProcessor,
    SlotRule,
    StoreError,
    TextEmbedder,
)
from refrag.integrations.answering import Answerer
from refrag.integrations.prompt_embeds import mixed_cache_key

from tests.support.accuracy import relative_error

BOUND = 1e-5
BRIDGE = Passage("The bridge of Orla was built in 1871 by Ada Lind. It is 40 m long and 6 m wide.", "bridge")
BREAD = Passage("Bread needs flour, water, salt and yeast.\n", "bread")
RAIN = Passage("It rained all day.", "rain")
QUESTION = "When was the bridge built?"
RULE = SlotRule(rows=1, whole=1)


@pytest.fixture
def encoder(kv_model, kv_processor):
    return KVEncoder(kv_model, kv_processor, full=True)


@pytest.fixture
def store(tmp_path, encoder):
    store = KVStore.create(tmp_path / "store", encoder.fingerprint, torch.float32, full=True)
    assert encoder.fill(store, [BRIDGE, BREAD, RAIN]) == (3, 0, 0)
    return store


def asked(kv_processor, *passages, question=QUESTION):
    return kv_processor.apply_chat_template([{"role": "user", "content": [*passages, question]}])


def test_prompts_keep_the_positions_of_all_tokens(kv_processor, tokenizer):
    prompt = kv_processor(["Read: ", BRIDGE, "\n", BREAD, QUESTION], expand={1})
    sizes = [len(chunk.token_ids) for chunk in prompt.chunks]
    before, after = (len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in ("Read: ", QUESTION))
    passages = prompt.passage_of_span.tolist()
    assert passages == [-1, 0, 0, 0, 0, -1, 1, 1, -1] and sizes[1] == 8
    # The last chunk of each passage stays whole, by the rule.
    assert prompt.expanded == {1, 3, 5}
    assert prompt.layout.lengths() == [[before, 1, 8, 1, sizes[3], 1, 1, sizes[5], after]]
    assert int(prompt.position_ids[-1]) == before + sum(sizes) + 1 + after - 1
    assert prompt.kv_slots == RULE and prompt.chunk_embeds is None and len(prompt.encoder_input.token_ids) == 0


def test_a_prompt_from_the_store_equals_one_from_text(kv_model, kv_processor, store):
    for passages, expand in (([BRIDGE, BREAD], ()), ([RAIN, BREAD, BRIDGE], {0, 3})):
        expected = kv_model.read(kv_processor(asked(kv_processor, *passages), expand=expand))
        by_id = [Passage(id=passage.id) for passage in passages]
        for own in (passages, by_id):
            prompt = kv_processor(asked(kv_processor, *own), expand=expand, store=store)
            assert len(prompt.passages) == len(passages)
            assert relative_error(kv_model.read(prompt).last_logits(), expected.last_logits()) < BOUND


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float8_e4m3fn, 0.1)])
def test_stores_in_fewer_bits(tmp_path, kv_model, kv_processor, encoder, dtype, bound):
    store = KVStore.create(tmp_path / "low", encoder.fingerprint, dtype, full=True)
    encoder.fill(store, [BRIDGE, BREAD])
    prompt = kv_processor(asked(kv_processor, BRIDGE, BREAD), expand={0}, store=store)
    exact = kv_model.read(kv_processor(asked(kv_processor, BRIDGE, BREAD), expand={0}))
    assert 1e-6 < relative_error(kv_model.read(prompt).last_logits(), exact.last_logits()) < bound


def test_nothing_is_read_from_the_store_twice(kv_model, kv_processor, store, encoder, monkeypatch):
    monkeypatch.setattr("refrag.model.slot_prefill.read_passages", lambda *_, **__: pytest.fail("read a passage"))
    state = kv_model.read(kv_processor(asked(kv_processor, BRIDGE, BREAD), store=store))
    kv_model.expand(state, 0)
    kv_model.generate(state=state, max_new_tokens=2, do_sample=False)
    monkeypatch.setattr("refrag.encoding.kv_encoder.read_passages", lambda *_, **__: pytest.fail("read a passage"))
    assert encoder.fill(store, [BRIDGE, RAIN], shard_passages=1) == (0, 2, 0)


def test_without_full_rows_an_expanded_chunk_is_read_again(tmp_path, kv_model, kv_processor):
    encoder = KVEncoder(kv_model, kv_processor)
    store = KVStore.create(tmp_path / "slots", encoder.fingerprint, torch.float32)
    encoder.fill(store, [BRIDGE, BREAD])
    prompt = kv_processor(asked(kv_processor, BRIDGE, BREAD), expand={0}, store=store)
    expected = kv_model.read(kv_processor(asked(kv_processor, BRIDGE, BREAD), expand={0}))
    assert relative_error(kv_model.read(prompt).last_logits(), expected.last_logits()) < BOUND


def test_cosines_pick_chunks_with_a_store(kv_model, kv_processor, store, encoder_tokenizer):
    selector = CosineSelector(TextEmbedder(kv_model, encoder_tokenizer))
    with_store = kv_processor(asked(kv_processor, BRIDGE, BREAD), expand_count=2, selector=selector, store=store)
    assert (
        with_store.expanded
        == kv_processor(asked(kv_processor, BRIDGE, BREAD), expand_count=2, selector=selector).expanded
    )


def test_a_saved_processor_keeps_its_slots(tmp_path, kv_processor):
    kv_processor.save_pretrained(tmp_path)
    again = RefragProcessor.from_pretrained(tmp_path)
    assert again.kv_slots == RULE and again.position_ids == "original"


def test_a_first_chunk_that_is_expanded_has_the_start_token_too(kv_processor):
    assert kv_processor.tokenizer.bos_token_id is not None
    for expand in ((), {0}):
        prompt = kv_processor([BRIDGE, QUESTION], expand=expand)
        assert prompt.token_ids[0] == kv_processor.tokenizer.bos_token_id and prompt.passage_of_span[0] == -1
    assert kv_processor.shared_text([BRIDGE, QUESTION]) == [kv_processor.tokenizer.bos_token_id]


def test_refusals(tmp_path, kv_model, kv_processor, store, tokenizer, encoder_tokenizer):
    with pytest.raises(StoreError, match="shared_text: holds passages read behind .*user.*, got prompt 0 with 'Read: "):
        kv_processor(["Read: ", BRIDGE, QUESTION], store=store)
    other = RefragProcessor(tokenizer, encoder_tokenizer, 8, position_ids="original", kv_slots=SlotRule(2))
    with pytest.raises(StoreError, match=r"slots: holds 1 row of each chunk, .* the last 1 .* whole, got .* of 2 rows"):
        other(asked(other, BRIDGE), store=store)
    with pytest.raises(StoreError, match="chunker: holds fixed, k = 8, got a processor of fixed, k = 4"):
        RefragProcessor(tokenizer, encoder_tokenizer, 4, position_ids="original", kv_slots=RULE)(BRIDGE, store=store)
    plain = RefragProcessor(tokenizer, encoder_tokenizer, 8)
    with pytest.raises(StoreError, match=r"slots: holds 1 row of .*, got a processor of embedding slots"):
        plain(asked(plain, BRIDGE), store=store)
    fingerprint = Fingerprint("tiny", "r1", "t1", "t2", store.fingerprint.chunker, "first", True, 4)
    embeds = ChunkStore.create(tmp_path / "embeds", fingerprint)
    with pytest.raises(StoreError, match="slots: holds embedding slots, got a processor of 1 row of each chunk"):
        kv_processor(asked(kv_processor, BRIDGE), store=embeds)
    with pytest.raises(ValueError, match="processor: got slots None, needs the model's key/value slots, 1 row of"):
        KVEncoder(kv_model, plain)
    with pytest.raises(ValueError, match="rows: got 9, needs 1 to the chunk_size of 8"):
        RefragProcessor(tokenizer, encoder_tokenizer, 8, position_ids="original", kv_slots=SlotRule(9))
    with pytest.raises(ValueError, match="position_ids: got 'contiguous' with kv_slots"):
        RefragProcessor(tokenizer, encoder_tokenizer, 8, kv_slots=RULE)
    with pytest.raises(ValueError, match="batch_tokens: got 0"):
        KVEncoder(kv_model, kv_processor, batch_tokens=0)
    with pytest.raises(ValueError, match="model: is in training mode"):
        KVEncoder(kv_model.train(), kv_processor)
    kv_model.eval()
    encoder = KVEncoder(kv_model, kv_processor)
    with pytest.raises(ValueError, match="passage 'empty': has no text"):
        encoder.encode([Passage(" ", "empty")])
    with pytest.raises(PromptTooLongError, match="needs at most the 256 of the decoder's max_position_embeddings"):
        encoder.encode([Passage("word " * 300, "long")])
    with pytest.raises(PromptTooLongError, match="with key/value slots, all tokens count, so no k fits"):
        kv_processor([Passage("word " * 300), QUESTION])
    with pytest.raises(StoreError, match="decoder: holds keys and values of"):
        store.require(dataclasses.replace(store.fingerprint, revision="other"))


def test_a_policy_picks_chunks(kv_model, kv_processor, encoder_tokenizer):
    torch.manual_seed(0)
    policy = ExpansionPolicy(kv_model.config.chunk_width).eval()
    selector = PolicySelector(policy, TextEmbedder(kv_model, encoder_tokenizer))
    prompt = kv_processor(asked(kv_processor, BRIDGE, BREAD), expand=0.25, selector=selector)
    whole = {3, 5}  # by the rule
    assert len(prompt.expanded | whole) == len(prompt.expanded) and kv_model.read(prompt).rows > 0


def test_answers_of_the_integrations(kv_model, kv_processor, store):
    answerer = Answerer(kv_model, kv_processor, selector="cosine", expand_count=1, max_new_tokens=4)
    read = answerer.answer(QUESTION, [BRIDGE, BREAD])
    assert isinstance(read, str) and "".join(answerer.stream(QUESTION, [BRIDGE, BREAD])) == read
    stored = Answerer(kv_model, kv_processor, selector="attention", expand=0.5, max_new_tokens=4, store=store,
                      template="{passages}{question}")  # fmt: skip
    assert isinstance(stored.answer(QUESTION, [Passage(id="bridge"), RAIN]), str)
    with pytest.raises(ValueError, match="prompt: got key/value slots, needs embedding slots"):
        mixed_cache_key(kv_processor(asked(kv_processor, BRIDGE)))


def test_the_real_decoder_with_every_row_kept(smollm2, minilm, tokenizer, encoder_tokenizer):
    """SmolLM2 with all rows gives the logits of the plain cache on full text, in any order of the passages."""
    parts = copy.deepcopy(minilm), copy.deepcopy(smollm2)
    fields = dict(slot_rows=8, position_ids="parallel")
    model = RefragForCausalLM.from_parts(*parts, 8, preset="kv", **fields).eval()
    processor = RefragProcessor.from_config(model.config, tokenizer, encoder_tokenizer)
    prompts = [processor(asked(processor, *order)) for order in ((BRIDGE, BREAD, RAIN), (RAIN, BRIDGE, BREAD))]
    cache = PassageCache(model)
    got = [cache.read(prompt).last_logits() for prompt in prompts]
    assert (cache.hits, cache.misses) == (3, 3)
    model.config.slots = "embedding"
    processor = RefragProcessor.from_config(model.config, tokenizer, encoder_tokenizer)
    for order, logits in zip(((BRIDGE, BREAD, RAIN), (RAIN, BRIDGE, BREAD)), got):
        text = processor(asked(processor, *order), expand=1.0)
        assert relative_error(logits, PassageCache(model).read(text).last_logits()) < BOUND
