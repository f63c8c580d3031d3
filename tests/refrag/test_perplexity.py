"""The table of perplexities: each condition does what its name says, and the figures equal those of plain models."""

import json
import math

import pytest
import torch
from refrag.model.policy import ExpansionPolicy
from refrag.training.perplexity import (
    COMPRESSED,
    FULL,
    LAST,
    NONE,
    Conditions,
    markdown,
    measure,
    share_for_rate,
    summary,
    value_kept,
    write_tables,
)

from tests.refrag import training_parts

CONDITIONS = Conditions(
    context=16, output_tokens=6, rates=(2.0, 4.0), selectors=("random", "perplexity-desc", "cosine")
)


@pytest.fixture
def parts(tokenizer, encoder_tokenizer):
    own = training_parts.parts(tokenizer, encoder_tokenizer)
    own.model.eval()
    return own


def loss(model, before, output):
    """Return the plain decoder's loss on one unpacked sequence."""
    ids = torch.tensor([[*before, *output]])
    logits = model.decoder(input_ids=ids).logits[0].log_softmax(-1)
    rows = range(len(before), ids.shape[1])
    return -sum(logits[row - 1, ids[0, row]].item() for row in rows) / len(output)


def test_text_conditions_are_the_plain_decoder(parts, tokenizer):
    documents = training_parts.documents(tokenizer)
    scores = measure(parts, documents, CONDITIONS, samples=3, seed=5)
    windows = documents.windows(22)
    for index in range(3):
        tokens = windows.draw(5, index).token_ids
        context, output = tokens[:16], tokens[16:]
        for name, before in ((FULL, [1, *context]), (NONE, [1]), (LAST, [1, *context[-4:]])):
            assert scores[name][index] == pytest.approx(loss(parts.model, before, output), rel=1e-5)
    assert list(scores) == [FULL, NONE, LAST, COMPRESSED, "random, 2x", "perplexity-desc, 2x", "cosine, 2x"]


def test_a_rate_of_one_is_the_full_context(parts, tokenizer):
    conditions = Conditions(context=16, output_tokens=6, rates=(1.0,), selectors=("random",))
    scores = measure(parts, training_parts.documents(tokenizer), conditions, samples=2)
    assert scores["random, 1x"] == pytest.approx(scores[FULL], rel=1e-5)
    assert scores[COMPRESSED] != pytest.approx(scores[FULL], rel=1e-3)


def test_policy_and_untrained_decoder(parts, tokenizer):
    policy = ExpansionPolicy(32, width=16, num_heads=2)
    conditions = Conditions(context=16, output_tokens=6, rates=(2.0,), selectors=("policy",))
    documents = training_parts.documents(tokenizer)
    scores = measure(parts, documents, conditions, samples=2, policy=policy, base=parts.model)
    assert len(scores["policy, 2x"]) == 2
    assert scores[f"{FULL} (untrained)"] == pytest.approx(scores[FULL])
    with pytest.raises(ValueError, match="selectors: got policy"):
        measure(parts, documents, conditions, samples=1)
    with pytest.raises(ValueError, match="context: got 18, needs a multiple of k = 4"):
        measure(parts, documents, Conditions(context=18), samples=1)


def test_rates():
    for k, rate in ((8, 4), (16, 8), (32, 3.5)):
        share = share_for_rate(rate, k)
        assert k / (1 - share + k * share) == pytest.approx(rate)
    assert share_for_rate(16, 16) == 0 and share_for_rate(1, 16) == 1
    with pytest.raises(ValueError, match="rate: got 17"):
        share_for_rate(17, 16)


def test_tables(tmp_path):
    scores = {FULL: [1.0, 2.0], NONE: [3.0, 6.0], LAST: [2.0, 4.0], COMPRESSED: [1.5, 2.5]}
    rows = summary(scores)
    by_name = {row["condition"]: row for row in rows}
    assert by_name[COMPRESSED]["log_perplexity"] == 2.0
    assert by_name[COMPRESSED]["value_kept"] == pytest.approx((4.5 - 2.0) / (4.5 - 1.5))
    assert by_name[COMPRESSED]["standard_error"] == 0  # the same loss in every sample
    assert by_name[LAST]["standard_error"] == pytest.approx(math.sqrt(((1 - 1.5) ** 2 + (2 - 1.5) ** 2) / 1 / 2))
    assert value_kept({FULL: 1, NONE: 3, "x": 3}, "x") == 0
    files = write_tables(tmp_path, {"here": rows, "there": rows}, {"k": 4})
    assert [path.stat().st_size > 100 for path in files] == [True] * 3
    assert json.loads(files[1].read_text())["tables"]["there"] == rows
    assert "| compressed | 2.000 ± 0.000 (83%) | 2.000 ± 0.000 (83%) |" in markdown({"here": rows, "there": rows})
