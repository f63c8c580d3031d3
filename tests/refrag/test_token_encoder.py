"""Pooling "concat", which keeps the order of a chunk's rows, and encoders built from the decoder."""

import pytest
import torch
from refrag import RefragConfig, RefragForCausalLM
from refrag.model.encoder import encode_packed
from refrag.model.inputs import PackedTexts
from refrag.model.token_encoder import first_layers, token_encoder

from refrag_kernels import ChunkLayout
from tests.refrag import tiny

LENGTHS = [3, 8, 5, 1, 12, 4]


@pytest.mark.parametrize("segments", [1, 3, 4, 8])
def test_concat_is_the_mean_of_each_run(segments):
    encoder = tiny.encoder("bert")
    encoder.set_attn_implementation("refrag")
    ids = torch.randint(3, tiny.VOCABULARY, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    texts = PackedTexts(ids, ChunkLayout.from_lengths([LENGTHS]))
    pooled = encode_packed(encoder, texts, "concat", segments)
    row = 0
    for length, own in zip(LENGTHS, pooled):
        hidden = encoder(input_ids=ids[None, row : row + length]).last_hidden_state[0]
        row += length
        stretched = max(length, segments)
        hidden = hidden[[place * length // stretched for place in range(stretched)]]
        edges = [segment * stretched // segments for segment in range(segments)] + [stretched]
        wanted = torch.cat([hidden[start:end].mean(0) for start, end in zip(edges, edges[1:])])
        torch.testing.assert_close(own, wanted, rtol=2e-5, atol=2e-5)
    nothing = PackedTexts(ids[:0], ChunkLayout.from_lengths([[]]))
    assert encode_packed(encoder, nothing, "concat", segments).shape == (0, segments * 32)


def test_concat_runs_through_the_model():
    model = tiny.refrag("llama", "bert", pooling="concat", pool_segments=3)
    assert model.config.chunk_width == 96 == model.projector.up.in_features
    prompt = tiny.prompt(tiny.MIXED)
    embeds = model.encode_chunks(prompt.encoder_input)
    assert embeds.shape == (len(prompt.chunks), 96)
    torch.testing.assert_close(model(prompt=prompt).logits, model(prompt=prompt, chunk_embeds=embeds).logits)
    with pytest.raises(ValueError, match=r"chunk_embeds: got shape \[8, 32\], needs \[8, 96\]"):
        model(prompt=prompt, chunk_embeds=embeds[:, :32].contiguous())
    with pytest.raises(ValueError, match="pool_segments: got 0"):
        RefragConfig(pool_segments=0)


@pytest.mark.parametrize("layers", [0, 2])
def test_the_token_encoder_encodes_tokens_and_positions(layers):
    decoder = tiny.decoder("llama")
    encoder = token_encoder(decoder, layers=layers)
    assert torch.equal(encoder.embeddings.word_embeddings.weight, decoder.get_input_embeddings().weight)
    assert len(encoder.encoder.layer) == layers
    ids = torch.tensor([[5, 6, 5]])
    rows = encoder(input_ids=ids).last_hidden_state[0]
    same_token = torch.nn.functional.cosine_similarity(rows[0], rows[2], dim=0)
    other_token = torch.nn.functional.cosine_similarity(rows[0], rows[1], dim=0)
    assert other_token < 0.6 < same_token < 0.9999
    assert torch.equal(rows, token_encoder(decoder, layers=layers)(input_ids=ids).last_hidden_state[0])
    with pytest.raises(ValueError, match="layers: got -1"):
        token_encoder(decoder, layers=-1)


def test_first_layers_run_the_encoders_attention_in_both_directions():
    decoder = tiny.decoder("llama")
    encoder = first_layers(decoder, 2)
    assert all(layer.self_attn.config is encoder.config for layer in encoder.layers)
    model = RefragForCausalLM.from_parts(encoder, decoder, 4, pooling="mean")
    texts = PackedTexts(torch.tensor([5, 6, 7, 8, 9, 10]), ChunkLayout.from_lengths([[3, 3]]))
    with torch.no_grad():
        before = model.encode_chunks(texts)
        texts.token_ids[2] = 11
        changed = encode_packed(model.encoder, texts, "first")
        texts.token_ids[2] = 7
        first = encode_packed(model.encoder, texts, "first")
    assert not torch.allclose(changed[0], first[0]), "a chunk's first row must attend to its last"
    assert torch.equal(changed[1], first[1]) and before.shape == (2, 48)
