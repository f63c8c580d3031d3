"""PassageEncoder: encoding passages into a store, and prompts from the store."""

import copy

import pytest
import torch
from refrag import ChunkStore, Passage, PassageEncoder, RefragForCausalLM, RefragProcessor, StoreError
from refrag.data.chunking import SentenceChunks
from refrag.integrations.prompt_embeds import build
from refrag.model.encoder import pack_texts
from refrag.model.token_encoder import token_encoder
from refrag.store.fingerprint import Fingerprint, encoder_digest, tokenizer_digest
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, RobertaModel

from tests.refrag import tiny

PASSAGES = [
    Passage("The bridge of Orla was built in 1871 and is 40 m long. It is older than the town.", "bridge"),
    Passage("Ünïcödé — 你好,世界 🎉👩‍👩‍👧 नमस्ते", "unicode"),
    Passage("\n\n  a\n\n\n\n \n b \r\n\r\n", "empty lines"),
    Passage("x = 1\n" * 40, "code"),
    Passage("One."),
]


@pytest.fixture(scope="module")
def model(minilm, tokenizer):
    """A real encoder, for real tokenizers, and a tiny decoder."""
    config = copy.deepcopy(tiny.DECODERS["llama"])
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 1024
    torch.manual_seed(0)
    decoder = AutoModelForCausalLM.from_config(config).eval()
    return RefragForCausalLM.from_parts(copy.deepcopy(minilm), decoder, 16, preset="lclm", encoder_window=0)


@pytest.fixture
def processor(model, tokenizer, encoder_tokenizer):
    return RefragProcessor.from_config(model.config, tokenizer, encoder_tokenizer)


@pytest.fixture
def encoder(model, processor):
    return PassageEncoder.from_model(model, processor)


@pytest.fixture
def store(encoder, tmp_path):
    return ChunkStore.create(tmp_path / "store", encoder.fingerprint)


def assert_close(got, expected, tolerance=1e-5):
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
def test_rows_equal_those_of_each_chunk_alone(model, processor, batch_tokens):
    own, embeds = PassageEncoder.from_model(model, processor, batch_tokens=batch_tokens).encode(PASSAGES)
    assert own == [processor.chunker(passage.text) for passage in PASSAGES]
    texts = [chunk.text for chunks in own for chunk in chunks]
    alone = [
        model.encode_chunks(
            pack_texts(processor.encoder_tokenizer, [text], special_tokens=processor.encoder_special_tokens)
        )
        for text in texts
    ]
    assert_close(embeds, torch.cat(alone))


def test_answers_from_the_store_without_encoding(model, processor, encoder, store, monkeypatch):
    assert encoder.fill(store, PASSAGES, shard_passages=2) == (5, 0, 0)
    parts = ["Read this: ", *PASSAGES, "How old is the bridge?"]
    prompts = [parts, [PASSAGES[3], "What is x?"]]
    plain = [processor(parts), processor(prompts, expand={1, 3}), processor(parts, expand=1.0)]
    logits = [model(prompt=prompt).logits for prompt in plain]
    answer = model.generate(plain[0], max_new_tokens=8, do_sample=False)

    def must_not_run(*arguments, **options):
        raise AssertionError("something was encoded or cut")

    monkeypatch.setattr(model.encoder, "forward", must_not_run)
    monkeypatch.setattr(type(processor.chunker), "__call__", must_not_run)

    def by_id(prompt):
        return [Passage(id=part.id) if isinstance(part, Passage) and part.id else part for part in prompt]

    for named in (lambda prompt: prompt, by_id):
        both = [named(prompt) for prompt in prompts]
        stored = [
            processor(both[0], store=store),
            processor(both, expand={1, 3}, store=store),
            processor(both[0], expand=1.0, store=store),
        ]
        for prompt, expected, own in zip(stored, logits, plain):
            assert prompt.chunks == own.chunks and torch.equal(prompt.token_ids, own.token_ids)
            assert_close(model(prompt=prompt).logits, expected)
        assert torch.equal(model.generate(stored[0], max_new_tokens=8, do_sample=False), answer)


def test_prompt_embeddings_and_their_key(model, processor, encoder, store):
    """Inputs for serving engines are built from the stored rows, and their keys depend on these."""
    encoder.fill(store, PASSAGES)
    one, same, other = (
        build(model, processor([Passage(id=id), "So?"], store=store))[0] for id in ("bridge", "bridge", "unicode")
    )
    assert one.key == same.key != other.key
    assert_close(one.embeds, build(model, processor([PASSAGES[0], "So?"]))[0].embeds)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 4e-4)])
def test_half_precision_rows(encoder, processor, model, tmp_path, dtype, tolerance):
    store = ChunkStore.create(tmp_path, encoder.fingerprint, dtype)
    encoder.fill(store, PASSAGES)
    prompt = processor([*PASSAGES, "So?"], store=store)
    assert prompt.chunk_embeds.dtype == dtype
    assert_close(prompt.chunk_embeds, encoder.encode(PASSAGES)[1], tolerance)
    assert model(prompt=prompt).logits.isfinite().all()


def test_sentence_chunks_and_prompts_without_passages(model, tokenizer, encoder_tokenizer, tmp_path):
    processor = RefragProcessor.from_config(model.config, tokenizer, encoder_tokenizer, chunker="sentence")
    encoder = PassageEncoder.from_model(model, processor)
    store = ChunkStore.create(tmp_path, encoder.fingerprint)
    encoder.fill(store, PASSAGES)
    assert store.fingerprint.chunker == "sentence, 16 to 32 words, at most 128 tokens"
    expected = model(prompt=processor([*PASSAGES, "So?"])).logits
    assert_close(model(prompt=processor([*PASSAGES, "So?"], store=store)).logits, expected)
    assert model(prompt=processor(["So?"], store=store)).logits.isfinite().all()


@pytest.mark.parametrize("segments", [1, 4])
def test_concatenated_rows_of_a_token_encoder(model, tokenizer, tmp_path, segments):
    decoder = model.decoder
    model = RefragForCausalLM.from_parts(token_encoder(decoder), decoder, 16, preset="tokens", pool_segments=segments)
    processor = RefragProcessor.from_config(model.config, tokenizer, tokenizer)
    encoder = PassageEncoder.from_model(model, processor)
    store = ChunkStore.create(tmp_path, encoder.fingerprint)
    assert encoder.fingerprint.width == segments * 48 and encoder.fingerprint.pooling == f"concat, {segments} segments"
    encoder.fill(store, PASSAGES)
    expected = model(prompt=processor([*PASSAGES, "So?"])).logits
    assert_close(model(prompt=processor([*PASSAGES, "So?"], store=store)).logits, expected)


def test_only_missing_passages_are_encoded(encoder, store, monkeypatch):
    encoded = []
    real = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda passages: encoded.extend(passages) or real(passages))
    twice = Passage(PASSAGES[0].text, "bridge again")
    assert encoder.fill(store, [*PASSAGES[:2], twice]) == (2, 1, 0)
    assert [passage.id for passage in encoded] == ["bridge again", "unicode"]
    assert encoder.fill(store, iter([*PASSAGES, Passage(PASSAGES[1].text, "third name")])) == (3, 3, 0)
    assert [passage.id for passage in encoded[2:]] == ["empty lines", "code", None]
    assert torch.equal(store.get(Passage(id="bridge again")), store.get(PASSAGES[0]))
    assert torch.equal(store.get(Passage(id="third name")), store.get(PASSAGES[1]))
    assert encoder.fill(store, PASSAGES) == (0, 5, 0) and len(encoded) == 5
    edited = Passage("The bridge fell in 1920.", "bridge")
    assert encoder.fill(store, [edited]) == (1, 0, 1) and store.passage("bridge") == edited


def test_an_error_keeps_the_shards_before_it(encoder, store):
    with pytest.raises(ValueError, match="passage 'blank': has no text"):
        encoder.fill(store, [*PASSAGES[:4], Passage(" \n", "blank")], shard_passages=2)
    assert len(ChunkStore.open(store.folder, encoder.fingerprint)) == 4


def test_another_encoder_or_k_is_refused(model, processor, encoder, store, tokenizer, encoder_tokenizer):
    coarse = RefragProcessor(tokenizer, encoder_tokenizer, 32, encoder_special_tokens=processor.encoder_special_tokens)
    other = PassageEncoder.from_model(model, coarse)
    for refused in (lambda: ChunkStore.open(store.folder, other.fingerprint), lambda: other.fill(store, PASSAGES)):
        with pytest.raises(StoreError, match="chunker: holds fixed, k = 16, got fixed, k = 32$"):
            refused()
    with pytest.raises(StoreError, match="chunker: holds fixed, k = 16, got a processor of fixed, k = 32"):
        coarse([PASSAGES[0]], store=store)
    trained = copy.deepcopy(model.encoder)
    trained.get_parameter("encoder.layer.3.output.dense.weight")[5, 7] += 1e-3
    fingerprint = PassageEncoder(trained, processor, model.config).fingerprint
    with pytest.raises(
        StoreError, match=r"holds embeddings of .*model \(revision \w{24}\), got .* \(revision \w{24}\)$"
    ):
        ChunkStore.open(store.folder, fingerprint)
    with pytest.raises(StoreError, match="passage id 'nowhere'"):
        processor([Passage(id="nowhere")], store=store)
    with pytest.raises(ValueError, match="passage 'nowhere' of prompt 0: has no text, and no store is given"):
        processor([Passage(id="nowhere")])


def test_refusals(model, processor, tokenizer, encoder_tokenizer):
    with pytest.raises(ValueError, match="attention 'sdpa', needs 'refrag'"):
        PassageEncoder(tiny.encoder("bert"), processor, model.config)
    with pytest.raises(ValueError, match="training mode"):
        PassageEncoder(copy.deepcopy(model.encoder).train(), processor, model.config)
    with pytest.raises(ValueError, match="batch_tokens: got 0"):
        PassageEncoder.from_model(model, processor, batch_tokens=0)
    bare = RefragProcessor(tokenizer, encoder_tokenizer, chunker=lambda text: [])
    with pytest.raises(ValueError, match="chunker: function has no description"):
        PassageEncoder.from_model(model, bare)


@pytest.mark.parametrize("name", tiny.ENCODERS)
def test_an_encoders_digest_survives_saving(name, tmp_path):
    model = tiny.refrag(encoder_name=name)
    digest = encoder_digest(model.encoder)
    model.save_pretrained(tmp_path / "whole")
    model.encoder.save_pretrained(tmp_path / "part")
    assert encoder_digest(RefragForCausalLM.from_pretrained(tmp_path / "whole").encoder) == digest
    assert encoder_digest(AutoModel.from_pretrained(tmp_path / "part")) == digest
    # Settings outside the weights count as well; values that transformers makes up don't.
    model.encoder.config.norm_eps = model.encoder.config.layer_norm_eps = 0.1
    assert encoder_digest(model.encoder) != digest


@pytest.mark.parametrize("name", tiny.ENCODERS)
def test_every_weight_is_in_an_encoders_digest(name):
    """Down to the last element of each weight: otherwise a store would serve another encoder's embeddings."""
    encoder = tiny.encoder(name)
    weights = {name: value for name, value in encoder.state_dict().items() if not name.startswith("pooler.")}
    digests = {encoder_digest(encoder)}
    for value in weights.values():
        last = value.flatten()[-1].clone()
        value.view(-1)[-1] += 1
        digests.add(encoder_digest(encoder))
        value.view(-1)[-1] = last
    assert len(weights) > 12 and len(digests) == len(weights) + 1
    assert encoder_digest(encoder) in digests and encoder_digest(encoder.double()) not in digests


def test_a_random_pooler_does_not_count(tmp_path):
    encoder = RobertaModel(copy.deepcopy(tiny.ENCODERS["roberta"]), add_pooling_layer=False)
    encoder.save_pretrained(tmp_path)
    loaded = [RobertaModel.from_pretrained(tmp_path) for _ in range(2)]
    weights = [encoder.pooler.dense.weight for encoder in loaded]
    assert not torch.equal(*weights), "transformers no longer makes one up"
    assert encoder_digest(loaded[0]) == encoder_digest(loaded[1]) == encoder_digest(encoder)


def test_a_tokenizers_digest(processor, tokenizer, encoder_tokenizer, tmp_path):
    digests = [tokenizer_digest(tokenizer), tokenizer_digest(encoder_tokenizer)]
    assert digests[0] != digests[1]
    encoder_tokenizer("a b c", truncation=True, max_length=2, padding="max_length")
    processor.save_pretrained(tmp_path)
    again = RefragProcessor.from_pretrained(tmp_path)
    assert [tokenizer_digest(again.tokenizer), tokenizer_digest(again.encoder_tokenizer)] == digests
    grown = AutoTokenizer.from_pretrained(tmp_path / "encoder_tokenizer")
    grown.add_tokens(["orla"])
    assert tokenizer_digest(grown) != digests[1]


def test_chunkers_describe_all_their_settings(tokenizer):
    described = {
        SentenceChunks(tokenizer, *numbers, max_tokens=most).description
        for *numbers, most in [(16, 32, 128), (8, 32, 128), (16, 31, 128), (16, 32, 64)]
    }
    assert len(described) == 4


def test_fingerprints_of_each_field_differ():
    fingerprint = Fingerprint("e", "r", "a", "b", "c", "first", True, 8)
    fields = dict(revision="x", encoder_tokenizer="x", tokenizer="x", chunker="x", pooling="x", width=9)
    others = [Fingerprint(**{**vars(fingerprint), name: value}) for name, value in fields.items()]
    assert len({other.digest for other in (fingerprint, *others)}) == len(fields) + 1
    assert all(len(fingerprint.differences(other)) == 1 for other in others)
    assert not fingerprint.differences(fingerprint)
