"""The demo's corpus, and retrieval from it."""

import pytest
import torch
from refrag import Passage
from refrag.demo.corpus import python_reference
from refrag.retrieval.retriever import Retriever

from tests.refrag import tiny

PASSAGES = [
    Passage("A lambda expression makes an anonymous function.", "lambda"),
    Passage("Bread is baked from flour, water and yeast.", "bread"),
    Passage("The moon goes round the earth in a month.", "moon"),
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REFRAG_CACHE", str(tmp_path))
    return tmp_path


def test_corpus():
    passages = python_reference()
    ids = [passage.id for passage in passages]
    assert len(ids) == len(set(ids)) > 300 and "lambda#1" in ids
    assert all(passage.text.strip() for passage in passages)
    paragraphs = [" ".join(part.split()) for passage in passages for part in passage.text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)), "a paragraph stands twice"
    assert passages == python_reference()


def test_ranks_by_meaning_and_keeps_the_embeddings(cache, demo_model, encoder_tokenizer, monkeypatch):
    retriever = Retriever(demo_model.encoder, encoder_tokenizer, PASSAGES)
    ranked = retriever.rank("How do I make dough?")
    assert ranked[0][0].id == "bread" and len(ranked) == 3
    assert ranked[0][1] > ranked[1][1] >= ranked[2][1]
    monkeypatch.setattr(Retriever, "_write", None)  # the second one must read what the first one wrote
    assert Retriever(demo_model.encoder, encoder_tokenizer, PASSAGES).rank("How do I make dough?") == ranked


def test_other_passages_are_embedded_anew(cache, demo_model, encoder_tokenizer):
    Retriever(demo_model.encoder, encoder_tokenizer, PASSAGES)
    Retriever(demo_model.encoder, encoder_tokenizer, PASSAGES[:2])
    assert len(list(cache.glob("passages-*"))) == 2


def test_another_encoder_embeds_anew(cache, encoder_tokenizer):
    """Neither encoder comes from a folder, so their names don't tell them apart; nor do the names of files."""
    encoder = tiny.refrag(encoder_name="bert").encoder
    encoder.resize_token_embeddings(len(encoder_tokenizer))
    passages = [Passage("a b c")]
    before = Retriever(encoder, encoder_tokenizer, passages).embeds
    list(encoder.parameters())[-3].data += 0.5
    after = Retriever(encoder, encoder_tokenizer, passages).embeds
    assert not torch.equal(before, after)


def test_refuses_an_empty_question(cache, demo_model, encoder_tokenizer):
    with pytest.raises(ValueError, match="question: is empty"):
        Retriever(demo_model.encoder, encoder_tokenizer, PASSAGES).rank(" \n")
