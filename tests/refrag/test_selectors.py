"""Selectors: the chunks that each picks, selection by name, and arguments that the processor refuses."""

import pytest
import torch
from refrag import (
    AllChunks,
    Chunk,
    CosineSelector,
    ExpansionPolicy,
    NoChunks,
    Passage,
    PerplexitySelector,
    PolicySelector,
    RefragProcessor,
    TextEmbedder,
    ThresholdSelector,
)
from refrag.processing import selectors
from torch import nn

from tests.refrag import tiny

CHUNKS = [Chunk(text, (index + 3, 9, 4)) for index, text in enumerate("abcdef")]
# Cosine similarity to the question: a 1, b 0.8, c 0.6, d 0, e -0.6, f -1. Vector lengths must not matter.
VECTORS = {
    "q": (2, 0), "a": (0.1, 0), "b": (8, 6), "c": (0.6, 0.8), "d": (0, 5), "e": (-3, 4), "f": (-1, 0),
}  # fmt: skip


def embed(texts):
    return torch.tensor([VECTORS[text] for text in texts], dtype=torch.float32)


@pytest.fixture(scope="module")
def processor(tokenizer, encoder_tokenizer):
    return RefragProcessor(tokenizer, encoder_tokenizer, 4)


def test_cosine_and_threshold():
    assert list(CosineSelector(embed)("q", CHUNKS[::-1], 2)) == [5, 4]
    assert CosineSelector(embed)("q", CHUNKS, 0) == []
    assert ThresholdSelector(embed, 0.59)("q", CHUNKS[::-1], None) == [5, 4, 3]
    assert ThresholdSelector(embed, 0.59)("q", CHUNKS[::-1], 2) == [5, 4]
    assert ThresholdSelector(embed, 1.0)("q", CHUNKS[1:], None) == []
    assert ThresholdSelector(embed, -1.0)("q", [], None) == []
    with pytest.raises(ValueError, match="threshold: got 1.5, needs a cosine"):
        ThresholdSelector(embed, 1.5)


def test_nothing_and_everything(processor):
    prompt = [Passage("one two three four five six seven"), "So?"]
    assert processor(prompt, selector=NoChunks()).expanded == frozenset()
    everything = processor(prompt, selector=AllChunks())
    assert everything.expanded == set(range(len(everything.chunks))) and len(everything.chunks) > 1
    with pytest.raises(ValueError, match="expand: got 1 chunks for AllChunks, needs all"):
        processor(prompt, selector=AllChunks(), expand_count=1)
    with pytest.raises(ValueError, match="expand: got 1 chunks for NoChunks, needs none"):
        processor(prompt, selector=NoChunks(), expand_count=1)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_perplexity_equals_that_of_each_chunk_alone(name, decoders, monkeypatch):
    monkeypatch.setattr(selectors, "_ROWS", 7)  # several batches
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 5, 2, 9, 3, 3]
    chunks = [Chunk("x", tuple(torch.randint(3, 97, (n,), generator=generator).tolist())) for n in lengths]
    expected = []
    for chunk in chunks:
        ids = torch.tensor([[1, *chunk.token_ids]])
        expected.append(nn.functional.cross_entropy(decoders[name](ids).logits[0, :-1], ids[0, 1:]))
    expected = torch.stack(expected)
    model = tiny.refrag(name)
    assert torch.allclose(PerplexitySelector(model).log_perplexities(chunks), expected, rtol=1e-5)
    order = expected.argsort()
    assert PerplexitySelector(model, "asc")("", chunks, 2) == order[:2].tolist()
    assert PerplexitySelector(model, "desc")("", chunks, 3) == order.flip(0)[:3].tolist()


def test_perplexity_refuses_bad_arguments():
    model = tiny.refrag()
    with pytest.raises(ValueError, match="order: got 'up', needs asc or desc"):
        PerplexitySelector(model, "up")
    model.decoder.config.bos_token_id = model.decoder.config.eos_token_id = None
    with pytest.raises(ValueError, match="start: got None, needs a token"):
        PerplexitySelector(model)
    model.decoder.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="decoder: got attention 'sdpa'"):
        PerplexitySelector(model, start=1)("", CHUNKS, 1)


def random_policy():
    torch.manual_seed(4)
    policy = ExpansionPolicy(2, width=16, num_heads=2).eval()
    nn.init.normal_(policy.score.weight)
    return policy


def test_policy(tmp_path):
    policy = random_policy()
    best = policy(embed("abcdef")[None])[0].argsort(descending=True).tolist()
    assert PolicySelector(policy, embed)("q", CHUNKS, 4) == best[:4]
    draws = {tuple(PolicySelector(policy, embed, torch.Generator().manual_seed(i))("q", CHUNKS, 2)) for i in range(8)}
    assert len(draws) > 1
    policy.save_pretrained(tmp_path)
    loaded = ExpansionPolicy.from_pretrained(tmp_path).eval()
    assert PolicySelector(loaded, embed)("q", CHUNKS, 4) == best[:4]


@pytest.mark.parametrize("name", ["random", "cosine", "perplexity-asc", "perplexity-desc", "policy"])
def test_selectors_by_name_pick_count_chunks(name):
    selector = selectors.by_name(name, model=tiny.refrag(), embed=embed, threshold=0.5, policy=random_policy(), seed=3)
    for count in range(len(CHUNKS) + 1):
        picks = list(selector("q", CHUNKS, count))
        assert len(set(picks)) == len(picks) == count and set(picks) <= set(range(6))
    with pytest.raises(ValueError, match="expand: got None, .*Selector needs a fraction or a number"):
        selector("q", CHUNKS, None)


def test_selectors_by_name_with_their_own_criterion():
    picked = {name: list(selectors.by_name(name)("q", CHUNKS, None)) for name in ("nothing", "everything")}
    assert picked == {"nothing": [], "everything": [0, 1, 2, 3, 4, 5]}
    assert selectors.by_name("threshold", embed=embed, threshold=0.7)("q", CHUNKS, None) == [0, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("best", "selector: got 'best', needs one of nothing, everything, random"),
        ("cosine", "embed: got None, but the selector 'cosine' needs it"),
        ("threshold", "embed: got None, but the selector 'threshold'"),
        ("perplexity-asc", "model: got None, but the selector 'perplexity-asc'"),
        ("policy", "policy: got None, but the selector 'policy'"),
    ],
)
def test_by_name_refuses(name, message):
    with pytest.raises(ValueError, match=message):
        selectors.by_name(name)
    with pytest.raises(ValueError, match="threshold: got None"):
        selectors.by_name("threshold", embed=embed)


def test_the_embedder_encodes_texts_only_once(demo_model, encoder_tokenizer, processor, monkeypatch):
    calls = []
    encode = demo_model.encode_chunks
    monkeypatch.setattr(demo_model, "encode_chunks", lambda texts: calls.append(texts) or encode(texts))
    monkeypatch.setattr(processor, "encoder_special_tokens", demo_model.config.encoder_special_tokens)
    embedder = TextEmbedder(demo_model, encoder_tokenizer)
    parts = [Passage("The moon is bright. Bread needs flour."), "How do I bake bread?"]
    prompt = processor(parts, expand_count=1, selector=CosineSelector(embedder))
    chunk_embeds = embedder([chunk.text for chunk in prompt.chunks])
    assert len(calls) == 2 and torch.equal(chunk_embeds, encode(prompt.encoder_input))
    assert "flour" in "".join(prompt.chunks[index].text for index in prompt.expanded)
    assert embedder(["long " * 1000]).shape == (1, demo_model.config.encoder_config.hidden_size)


def test_counts_and_questions_of_a_batch(processor):
    asked = []

    def last(question, chunks, count):
        asked.append((question, count))
        return range(len(chunks) - count, len(chunks))

    batch = [["First?", Passage("a b c d e f g h i")], [Passage("j k l m n o"), "Second?"]]
    sizes = [sum(chunk.passage is None for chunk in processor(prompt).chunks) for prompt in batch]
    prompt = processor(batch, expand_count=[1, 2], selector=last)
    assert asked == [("First?", 1), ("Second?", 2)]
    assert prompt.expanded == {sizes[0] - 1, sizes[0] + sizes[1] - 2, sizes[0] + sizes[1] - 1}
    processor(batch, expand_count=1, selector=last, question=["x", "y"])
    processor(batch, expand=0.0, selector=last, question="z")
    assert asked[2:] == [("x", 1), ("y", 1), ("z", 0), ("z", 0)]


def test_passages_by_id(processor):
    parts = [Passage("a b c d e f g h", "x"), Passage("i j", "y"), Passage("k l"), Passage("m n o p q", "x")]
    prompt = processor(parts)
    assert {chunk.passage for chunk in prompt.chunks} == {"x", "y", None}
    expected = {index for index, chunk in enumerate(prompt.chunks) if chunk.passage == "x"}
    assert processor(parts, expand=["x"]).expanded == expected
    y = next(index for index, chunk in enumerate(prompt.chunks) if chunk.passage == "y")
    assert processor(parts, expand=["y", 0]).expanded == {0, y}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"expand_count": 3}, "expand_count: got 3 for prompt 0, needs 0 to 2, its chunks"),
        ({"expand_count": [1, 9]}, "expand_count: got 9 for prompt 1, needs 0 to 1"),
        ({"expand_count": [1]}, "expand_count: got 1 numbers, needs 2, one for each prompt"),
        ({"expand_count": -1}, "expand_count: got -1 for prompt 0"),
        ({"expand_count": 1, "expand": 0.5}, "expand_count: got 1 with expand = 0.5"),
        ({"expand_count": 1}, "selector: got None, needs a Selector to expand 1 of the 2 chunks"),
        ({"question": ["a", "b", "c"]}, "question: got 3 questions, needs 2, one for each prompt"),
        ({"expand": ["z"]}, "expand: got passage 'z', needs one of the prompts' passages: 'x'$"),
        ({"expand": [3]}, "expand: got chunk 3, needs 0 to 2"),
        ({"expand": [0.5]}, "expand: got chunk 0.5, needs 0 to 2"),
        ({"selector": lambda *_: [2], "expand": 1.0}, "selector: picked chunk 2 of prompt 0, needs 0 to 1"),
        ({"selector": lambda *_: [0, 0], "expand": 1.0}, "selector: picked a chunk of prompt 0 twice"),
        ({"selector": lambda *_: [0, 1], "expand": 0.5}, "selector: picked 2 chunks of prompt 0, needs at most 1"),
    ],
)
def test_bad_arguments_are_refused(processor, how, message):
    batch = [[Passage("a b c d e f", "x"), "?"], [Passage("g h"), "?"]]
    assert len(processor(batch).chunks) == 3
    with pytest.raises(ValueError, match=message):
        processor(batch, **how)


def test_a_string_is_not_a_collection_of_passages(processor):
    with pytest.raises(TypeError, match="expand: got the string 'x'"):
        processor([Passage("a", "x")], expand="x")


def test_what_fits_after_expansion(tokenizer, encoder_tokenizer):
    processor = RefragProcessor(tokenizer, encoder_tokenizer, 4, window=40)
    parts = [Passage("word " * 60), "why " * 5]
    with pytest.raises(
        ValueError, match=r"over the decoder's window of 40; (\d+) of its \d+ expanded chunks would fit"
    ) as e:
        processor(parts, expand=1.0)
    fits = int(str(e.value).split("window of 40; ")[1].split()[0])
    assert processor(parts, expand=range(fits)).layout.total_rows <= 40 and fits > 0
    with pytest.raises(ValueError, match="of its"):
        processor(parts, expand=range(fits + 1))
