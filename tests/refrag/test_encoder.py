"""The encoder: chunks packed without padding equal the same chunks encoded one by one with padding."""

import pytest
import torch
from refrag import RefragConfig
from refrag.model.encoder import TextEmbedder, encode_packed, most_tokens, pack_texts
from refrag.model.inputs import PackedTexts
from transformers import CamembertConfig, LlamaConfig

from refrag_kernels import ChunkLayout
from tests.refrag import tiny
from tests.support.accuracy import relative_error


@pytest.mark.parametrize("pooling", ["first", "mean", "last"])
@pytest.mark.parametrize("name", tiny.ENCODERS)
def test_packed_equals_padded(name, pooling):
    lengths = [3, 17, 1, 40, 16, 2, 33]
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, tiny.VOCABULARY, (length,), generator=generator) for length in lengths]
    plain = tiny.encoder(name)
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=plain.config.pad_token_id)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    hidden = plain(input_ids=padded, attention_mask=mask).last_hidden_state
    pooled = {
        "first": hidden[:, 0],
        "mean": (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
        "last": hidden[torch.arange(len(lengths)), mask.sum(1) - 1],
    }[pooling]
    encoder = tiny.encoder(name)
    encoder.set_attn_implementation("refrag")
    packed = encode_packed(encoder, PackedTexts(torch.cat(texts), ChunkLayout.from_lengths([lengths])), pooling)
    assert relative_error(packed, pooled) < 1e-5


def test_real_encoder_equals_hugging_face(demo_model, minilm, encoder_tokenizer):
    texts = ["def f(x):\n\n    return x", "", "Ünïcödé 你好 🎉", "a " * 100]
    batch = encoder_tokenizer(texts, padding=True, return_tensors="pt")
    hidden = minilm(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    expected = (hidden * mask).sum(1) / mask.sum(1)
    packed = demo_model.encode_chunks(pack_texts(encoder_tokenizer, texts))
    assert relative_error(packed, expected) < 1e-5


def test_no_chunks():
    nothing = PackedTexts(torch.zeros(0, dtype=torch.int64), ChunkLayout.from_lengths([[]]))
    assert encode_packed(tiny.encoder("bert"), nothing, "mean").shape == (0, 32)


def test_a_text_too_long_for_the_encoder(encoder_tokenizer):
    with pytest.raises(ValueError, match="text 1 has 602 tokens for the encoder, needs at most 512"):
        pack_texts(encoder_tokenizer, ["a", "a " * 600])
    assert pack_texts(encoder_tokenizer, ["a", "a " * 600], truncate_to=8).layout.lengths() == [[3, 8]]


class _NoLimit:
    """A tokenizer without model_max_length that maps each word to a token."""

    model_max_length = int(1e30)

    def __call__(self, texts, *, truncation=False, max_length=None, **_):
        return {"input_ids": [[5] * len(text.split()[:max_length]) for text in texts]}


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_a_text_longer_than_the_encoders_positions(kind):
    model = tiny.refrag(encoder_name=kind)
    most = model.encoder.config.max_position_embeddings - (2 if kind == "roberta" else 0)
    assert most_tokens(model.encoder) == most
    words = "a " * (most + 1)
    embedder = TextEmbedder(model, _NoLimit())
    assert torch.equal(embedder([words]), embedder(["a " * most]))  # a question is truncated
    assert model.encode_chunks(pack_texts(_NoLimit(), ["a", "a " * most])).isfinite().all()
    with pytest.raises(ValueError, match=f"texts: text 1 has {most + 1} tokens for the encoder, needs at most {most}"):
        model.encode_chunks(pack_texts(_NoLimit(), ["a", words, "a"]))
    windows = pack_texts(_NoLimit(), ["a", "a " * 60, "a " * 50], window=1000, passages=[0, 1, 1])
    with pytest.raises(ValueError, match=f"texts: window 1 has 110 tokens .* needs at most {most}; use a smaller enc"):
        model.encode_chunks(windows)


def test_windows_exclude_padding_positions():
    config = RefragConfig.from_preset("lclm", LlamaConfig(), CamembertConfig(max_position_embeddings=66))
    assert config.window == 64


def test_without_special_tokens(encoder_tokenizer):
    texts = ["one two", " \n", "three"]
    packed = pack_texts(encoder_tokenizer, texts, special_tokens=False)
    assert packed.layout.lengths() == [[2, 2, 1]]  # a blank text has no other tokens, so it keeps them
    assert not set(packed.token_ids[[0, 1, 4]].tolist()) & set(encoder_tokenizer.all_special_ids)
