"""Encoder windows (RefragConfig.encoder_window): adjacent chunks of a passage that are encoded together."""

import copy
import dataclasses

import pytest
import torch
from refrag import (
    ChunkStore,
    CosineSelector,
    Passage,
    PassageEncoder,
    PolicySelector,
    RefragConfig,
    RefragForCausalLM,
    RefragProcessor,
    StoreError,
    TextEmbedder,
)
from refrag.integrations.prompt_embeds import mixed_cache_key
from refrag.model import encoder
from refrag.model.encoder import encode_packed, pack_texts
from refrag.model.inputs import PackedTexts
from transformers import AutoModelForCausalLM, BertConfig, RobertaConfig

from refrag_kernels import ChunkLayout
from tests.refrag import tiny
from tests.support.accuracy import relative_error

LENGTHS = [5, 3, 4, 9, 2, 6]
WINDOWS = [0, 0, 0, 1, 2, 2]


@pytest.mark.parametrize("name", tiny.ENCODERS)
@pytest.mark.parametrize("pooling", ["mean", "first", "last", "concat"])
def test_a_window_is_encoded_as_one_text(name, pooling):
    model = tiny.encoder(name)
    ids = torch.randint(3, tiny.VOCABULARY, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    expected = []
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    for window in range(3):
        own = [index for index, number in enumerate(WINDOWS) if number == window]
        start = bounds[own[0]]
        hidden = model(ids[None, start : bounds[own[-1] + 1]]).last_hidden_state[0]
        for index in own:
            rows = hidden[bounds[index] - start : bounds[index + 1] - start]
            if pooling == "concat":
                first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
                expected.append(torch.cat([first.mean(0), second.mean(0)]))
            else:
                expected.append({"mean": rows.mean(0), "first": rows[0], "last": rows[-1]}[pooling])
    model.set_attn_implementation("refrag")
    texts = PackedTexts(ids, ChunkLayout.from_lengths([LENGTHS]), torch.tensor(WINDOWS, dtype=torch.int32))
    pooled = encode_packed(model, texts, pooling, 2)
    assert relative_error(pooled, torch.stack(expected)) < 1e-5
    # Windows in another order, as in the passage encoder and the passage cache.
    order = [4, 5, 0, 1, 2]
    assert relative_error(encode_packed(model, texts.take(order), pooling, 2), pooled[order]) < 1e-5
    alone = encode_packed(model, PackedTexts(ids, texts.layout), pooling, 2)
    assert relative_error(alone, pooled) > 1e-2 and relative_error(alone[3], pooled[3]) < 1e-5


def test_windows_hold_whole_chunks_of_one_passage(encoder_tokenizer):
    texts = ["one two", " three four", " five", "six seven eight", " nine", " ten eleven twelve thirteen", " x"]

    def windows(most, passages):
        packed = pack_texts(encoder_tokenizer, texts, special_tokens=False, window=most, passages=passages)
        return packed.windows.tolist(), packed.layout.lengths()[0]

    assert windows(512, [0, 0, 0, 1, 1, 1, 1]) == ([0, 0, 0, 1, 1, 1, 1], [2, 2, 1, 3, 1, 4, 1])
    assert windows(4, [0, 0, 0, 1, 1, 1, 1])[0] == [0, 0, 1, 2, 2, 3, 4]
    assert windows(1, [0] * 7)[0] == list(range(7))
    assert pack_texts(encoder_tokenizer, texts, special_tokens=False).windows is None


PASSAGES = [
    Passage("The bridge of Orla was built in 1871 by Ada Lind. It is 40 m long.", "bridge"),
    Passage("Bread needs flour, water, salt and yeast.", "bread"),
]
PARTS = ["Read: ", *PASSAGES, "How do I bake bread?"]


@pytest.fixture(scope="module")
def model(minilm, tokenizer):
    torch.manual_seed(0)
    decoder = type(tiny.DECODERS["llama"])(**{**tiny._DECODER, "vocab_size": len(tokenizer)})
    decoder = AutoModelForCausalLM.from_config(decoder)
    return RefragForCausalLM.from_parts(copy.deepcopy(minilm), decoder, 4, preset="lclm").eval()


@pytest.fixture
def processor(model, tokenizer, encoder_tokenizer):
    return RefragProcessor.from_config(model.config, tokenizer, encoder_tokenizer)


def test_the_preset_encodes_passages_in_windows(model, processor, encoder_tokenizer, minilm):
    prompt = processor(PARTS)
    assert model.config.encoder_window == 1024 and processor.encoder_window == 512  # MiniLM's positions
    assert len(set(prompt.encoder_input.windows.tolist())) == 2
    first = [chunk.text for chunk in prompt.chunks if chunk.passage == "bridge"]
    ids = [encoder_tokenizer(text, add_special_tokens=False)["input_ids"] for text in first]
    hidden = minilm(torch.tensor([sum(ids, [])])).last_hidden_state[0]
    expected = torch.stack([rows.mean(0) for rows in hidden.split(list(map(len, ids)))])
    assert relative_error(model.encode_chunks(prompt.encoder_input)[: len(first)], expected) < 1e-5


def test_stores_and_saved_processors_keep_the_window(model, processor, tokenizer, tmp_path):
    source = PassageEncoder.from_model(model, processor, batch_tokens=20)
    assert source.fingerprint.pooling == "mean, windows of 512 tokens"
    store = ChunkStore.create(tmp_path / "store", source.fingerprint)
    source.fill(store, PASSAGES)
    own = model.encode_chunks(processor(PARTS).encoder_input)
    assert relative_error(store.get_many(PASSAGES).rows, own) < 1e-5
    processor.save_pretrained(tmp_path / "processor")
    again = RefragProcessor.from_pretrained(tmp_path / "processor")
    assert torch.equal(again(PARTS).encoder_input.windows, processor(PARTS).encoder_input.windows)
    alone = RefragProcessor(tokenizer, processor.encoder_tokenizer, 4, encoder_special_tokens=False)
    with pytest.raises(StoreError, match="pooling: holds mean, windows of 512 tokens, got mean"):
        ChunkStore.open(tmp_path / "store", PassageEncoder.from_model(model, alone).fingerprint)


def test_selectors_compare_chunks_encoded_in_their_windows(model, processor, encoder_tokenizer, monkeypatch):
    own = model.encode_chunks(processor(PARTS).encoder_input)
    calls = []
    monkeypatch.setattr(
        "refrag.model.modeling.encode_packed",
        lambda *a: calls.append(a[1].layout.num_chunks) or encoder.encode_packed(*a),
    )
    prompt = processor(PARTS, expand_count=2, selector=CosineSelector(TextEmbedder(model, encoder_tokenizer)))
    assert calls == [len(own), 1] and relative_error(prompt.chunk_embeds, own) < 1e-6
    model.generate(prompt, max_new_tokens=1)
    assert len(calls) == 2, "nothing is encoded twice"
    seen = []

    class Policy:
        def __call__(self, embeds):
            seen.append(embeds[0])
            return embeds.sum(-1)

    processor(PARTS, expand_count=2, selector=PolicySelector(Policy(), TextEmbedder(model, encoder_tokenizer)))
    assert relative_error(seen[0], own) < 1e-6


def test_content_keys_depend_on_neighbours(processor, tokenizer):
    chunk = tokenizer.decode(tokenizer(PASSAGES[0].text)["input_ids"][:4])
    one, other = (Passage(chunk + text, "p") for text in (" and it rained all day long", " and the sun shone all day"))
    keys = [
        mixed_cache_key(processor(["So: ", passage]).take(range(2)))
        for passage in (one, other)  # the text and the first slot
    ]
    assert keys[0] == keys[1]  # separated, each is encoded alone
    whole = [mixed_cache_key(processor(["So: ", passage])) for passage in (one, other)]
    assert whole[0] != whole[1]
    # Only the first chunk is compressed: its slot distinguishes the passages.
    slots = []
    for passage in (one, other):
        prompt = processor(["So: ", passage], expand=range(1, len(processor([passage]).chunks)))
        slots.append(mixed_cache_key(dataclasses.replace(prompt, token_ids=torch.zeros_like(prompt.token_ids))))
    assert slots[0] != slots[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_window": -1}, "encoder_window: got -1, needs an integer of 0 or more"),
        ({"encoder_window": 2.5}, "encoder_window: got 2.5"),
        ({"encoder_window": 8, "encoder_special_tokens": True}, "encoder_window: got 8 with encoder_special_tokens"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        RefragConfig.from_preset("lclm", tiny.DECODERS["llama"], tiny.ENCODERS["bert"], **fields)


def test_a_window_fits_the_encoders_positions():
    def window(config, **fields):
        return RefragConfig.from_preset("lclm", tiny.DECODERS["llama"], config, **fields).window

    assert window(BertConfig(max_position_embeddings=512)) == 512
    assert window(RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == 512
    assert window(BertConfig(max_position_embeddings=4096)) == 1024
    assert window(BertConfig(), encoder_window=0) == 0
