"""Texts and their embeddings are created on the CPU, regardless of torch.set_default_device."""

import pytest
import tiny
import torch
from refrag import ChunkStore, Passage, PassageEncoder, RefragForCausalLM, RefragProcessor, passage_encoder
from refrag.encoder import pack_texts
from refrag.token_scale import token_scale_of


def test_texts_for_the_encoder(encoder_tokenizer):
    texts, passages = ["one two", "three", "four five six"], [0, 0, 1]
    want = pack_texts(encoder_tokenizer, texts, window=16, passages=passages)
    with torch.device("meta"):
        packed = pack_texts(encoder_tokenizer, texts, window=16, passages=passages)
    assert torch.equal(packed.token_ids, want.token_ids) and torch.equal(packed.windows, want.windows)


def test_the_scale_of_token_embeddings():
    table = torch.nn.Embedding(3, 4)
    table.embed_scale, table.scalar_embed_scale = torch.tensor(33.94), 33.9411
    with torch.device("meta"):
        assert token_scale_of(table) == pytest.approx(33.9411)


@pytest.mark.parametrize("window", [0, 16])
def test_embeddings_of_passages(tmp_path, monkeypatch, tokenizer, encoder_tokenizer, window):
    model = RefragForCausalLM.from_parts(
        tiny.encoder("bert"), tiny.decoder("llama"), 4, encoder_window=window, encoder_special_tokens=not window
    )
    encoder = PassageEncoder.from_model(model, RefragProcessor.from_config(model.config, tokenizer, encoder_tokenizer))

    def encode_packed(encoder, texts, *pooling):
        """Replace the encoder, since transformers creates its own tensors on the default device."""
        lengths = texts.layout.chunk_offsets.diff()
        return lengths[:, None].expand(-1, encoder.config.hidden_size).to(encoder.dtype)

    monkeypatch.setattr(passage_encoder, "encode_packed", encode_packed)
    passages = [Passage("The tower was built in 1871 by two brothers."), Passage("It stands.")]
    want, rows = encoder.encode(passages)
    with torch.device("meta"):
        chunks, moved = encoder.encode(passages)
        store = ChunkStore.create(tmp_path / "store", encoder.fingerprint)
        assert store.get_many([]).rows.device.type == "cpu"
    assert chunks == want and torch.equal(moved, rows)
