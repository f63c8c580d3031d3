"""The shipped adapter: small, for the demo's models, and useful."""

import numpy as np
import pytest
from refrag import weights
from refrag.adapters import load_policy
from refrag.bundle import ModelBundle
from refrag.data.documents import Documents
from refrag.demo.corpus import python_reference
from refrag.loading import load_model, load_processor
from refrag.training.measures import reconstruction_accuracy
from refrag.training.perplexity import COMPRESSED, FULL, NONE, Conditions, measure


@pytest.fixture(scope="module")
def parts():
    processor = load_processor(None, 8)
    return ModelBundle(load_model(None, 8), processor.tokenizer, processor.encoder_tokenizer)


@pytest.fixture(scope="module")
def documents(parts):
    ids = [parts.tokenizer(passage.text)["input_ids"] for passage in python_reference()[::25]]
    return Documents(np.concatenate(ids), np.cumsum([0, *map(len, ids)]))


def test_it_is_small():
    assert weights.adapter_file(8).stat().st_size < 12e6
    assert weights.adapter_file(7) is None


def test_text_can_be_told_from_its_slots(parts, documents):
    figures = reconstruction_accuracy(parts.model, parts=parts, documents=documents, samples=64)
    assert figures["first_token_accuracy"] > 0.08  # an untrained slot gives 0.03


def test_slots_are_worth_a_part_of_the_context(parts, documents):
    scores = measure(parts, documents, Conditions(context=64, output_tokens=32, rates=()), samples=12)
    full, none, compressed = (sum(scores[name]) / 12 for name in (FULL, NONE, COMPRESSED))
    assert full < compressed < none
    assert (none - compressed) / (none - full) > 0.1


def test_its_policy_scores_its_chunks(parts):
    policy = load_policy(weights.adapter_file(8))
    embeds = parts.embed([passage.text[:30] for passage in python_reference()[:5]])
    scores = policy(embeds[None])[0]
    assert scores.shape == (5,) and scores.std() > 0  # an untrained one gives equal scores
