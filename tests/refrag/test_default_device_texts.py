"""Texts and their embeddings are created on the CPU, regardless of torch.set_default_device."""

import pytest
import torch
from refrag import (
    Chunk,
    ChunkStore,
    ExpansionPolicy,
    Passage,
    PassageEncoder,
    RandomSelector,
    RefragForCausalLM,
    RefragProcessor,
)
from refrag.bundle import start_projector
from refrag.encoding import passage_encoder
from refrag.integrations.vllm.passages import GivenPassage
from refrag.integrations.vllm.reading import read_passages
from refrag.model.encoder import pack_texts
from refrag.model.prefill_graph import PrefillGraph
from refrag.model.token_scale import token_scale_of
from refrag.training.likelihood import share_beginning
from refrag.training.options import RolloutOptions
from refrag.training.policy_gradient import train_policy
from refrag.training.samples import Sample, collate

from tests.refrag import tiny


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
        """Skip the encoder: transformers creates its own tensors on the default device."""
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


def _collated(sample, encoder_tokenizer):
    return collate([sample], encoder_tokenizer, position_ids="contiguous", special_tokens=True)


def test_prompts_and_samples(encoder_tokenizer):
    prompt = tiny.prompt([tiny.MIXED[0]] * 2)
    labels = torch.full_like(prompt.token_ids, -100)
    labels[-1] = 5
    sample = Sample(((-1, [5, 6]), (0, Chunk("one two", (7, 8))), (-1, [9, 10])), 2)
    single = tiny.prompt(tiny.MIXED[:1])
    wanted = single.take([0, 1, 5]), _collated(sample, encoder_tokenizer), share_beginning(prompt, labels)
    with torch.device("meta"):
        taken, collated, joined = (
            single.take([0, 1, 5]),
            _collated(sample, encoder_tokenizer),
            share_beginning(prompt, labels),
        )
    assert torch.equal(taken.token_ids, wanted[0].token_ids) and torch.equal(taken.slot_of_row, wanted[0].slot_of_row)
    assert torch.equal(collated[1], wanted[1][1])
    assert (joined is None) == (wanted[2] is None)
    if joined is not None:
        assert torch.equal(joined[0].passage_of_span, wanted[2][0].passage_of_span)


def test_random_choices():
    chunks = [Chunk("x", (number,)) for number in range(9)]
    want = RandomSelector(3)("", chunks, 4)
    with torch.device("meta"):
        assert RandomSelector(3)("", chunks, 4) == want


def test_a_projector_at_its_start():
    models = [tiny.refrag(preset="tokens", pool_segments=4), tiny.refrag(preset="tokens", pool_segments=4)]
    start_projector(models[0])
    with torch.device("meta"):
        start_projector(models[1])
    assert torch.equal(models[0].projector.up.weight, models[1].projector.up.weight)
    assert torch.equal(models[0].projector.down.weight, models[1].projector.down.weight)


def test_a_prefill_graphs_staging():
    model = tiny.refrag()
    with torch.device("meta"):
        assert PrefillGraph(model, rows=64, chunks=8)._staging.device.type == "cpu"


@pytest.mark.parametrize("options", [{}, {"expand": [0]}])
def test_passages_of_a_request(tokenizer, encoder_tokenizer, options):
    processor = RefragProcessor(tokenizer, encoder_tokenizer, 4)
    given = [GivenPassage("The tower was built in 1871 by two brothers."), GivenPassage("It stands.")]
    want = [passage.content() for passage in read_passages(given, processor, 32, options)]
    with torch.device("meta"):
        got = [passage.content() for passage in read_passages(given, processor, 32, options)]
    for mine, theirs in zip(got, want, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_step_of_the_policys_training():
    policies = [ExpansionPolicy(8, width=16, num_heads=2) for _ in range(2)]
    policies[1].load_state_dict(policies[0].state_dict())
    embeds = torch.randn(5, 8)

    def rewards(sample, rollouts, own):
        return torch.arange(len(rollouts), device="cpu")

    def train(policy):
        options = RolloutOptions(steps=1, contexts=2, rollouts=2, expand=0.5)
        with torch.enable_grad():
            train_policy(policy, lambda index: (None, embeds), rewards, options)

    train(policies[0])
    with torch.device("meta"):
        train(policies[1])
    for mine, theirs in zip(policies[0].parameters(), policies[1].parameters()):
        assert mine.device.type == "cpu" and mine.shape == theirs.shape
