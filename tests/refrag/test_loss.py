"""The loss of a packed prompt: it ignores slots and sequence ends, and trains all three parts."""

import pytest
import torch
import torch.nn.functional as F

from tests.refrag import tiny


def by_hand(logits, prompt, labels):
    """Compute the mean cross-entropy row by row."""
    losses, row = [], 0
    for lengths in prompt.layout.lengths():
        for own in range(sum(lengths)):
            here = row + own
            if own and labels[here] != -100 and prompt.slot_of_row[here] < 0:
                losses.append(F.cross_entropy(logits[here - 1], labels[here]))
        row += sum(lengths)
    return torch.stack(losses)


@pytest.mark.parametrize("decoder", tiny.DECODERS)
def test_equals_a_row_by_row_loss(decoder):
    model, prompt = tiny.refrag(decoder), tiny.prompt(tiny.MIXED)
    labels = prompt.token_ids.clone()
    labels[3:9] = -100
    output = model(prompt=prompt, labels=labels)
    losses = by_hand(output.logits[0], prompt, labels)
    assert torch.allclose(output.loss, losses.mean())
    assert torch.allclose(model(prompt=prompt, labels=labels[None], num_items_in_batch=5).loss, losses.sum() / 5)


def test_a_packed_batch_equals_its_sequences():
    model = tiny.refrag()
    batch = tiny.prompt([tiny.MIXED[0], tiny.MIXED[0]])
    logits = model(prompt=batch).logits[0]
    loss = model(prompt=batch, labels=batch.token_ids).loss
    assert torch.allclose(loss, by_hand(logits, batch, batch.token_ids).mean())


def test_no_row_predicts_the_next_sequences_first_token():
    """A sequence's loss doesn't depend on the next one: text, an empty sequence before it, or one row."""
    model = tiny.refrag()
    text, slot = [("text", 6)], [("slot", 0), ("text", 3)]
    batch = tiny.prompt([text, [], slot, text, [("text", 1)], text, []])
    labels = batch.token_ids.clone()
    loss = model(prompt=batch, labels=labels).loss
    assert torch.allclose(loss, by_hand(model(prompt=batch).logits[0], batch, labels).mean())
    starts = batch.layout.sequence_offsets[:-1].long().unique()
    firsts = starts[starts < len(labels)]
    assert len(firsts) == 5
    for unlike in ((labels[firsts] + 1) % tiny.VOCABULARY, torch.full_like(firsts, -100)):
        assert torch.equal(model(prompt=batch, labels=labels.index_copy(0, firsts, unlike)).loss, loss)
    # Every other label counts.
    for row in set(range(len(labels))) - set(firsts.tolist()):
        other = labels.clone()
        other[row] = (other[row] + 1) % tiny.VOCABULARY
        assert not torch.equal(model(prompt=batch, labels=other).loss, loss), row


def test_every_part_gets_a_gradient():
    model, prompt = tiny.refrag(), tiny.prompt(tiny.MIXED)
    with torch.enable_grad():
        model(prompt=prompt, labels=prompt.token_ids).loss.backward()
    for part in (model.encoder, model.projector, model.decoder):
        grads = [parameter.grad for parameter in part.parameters() if parameter.grad is not None]
        assert grads and all(grad.isfinite().all() for grad in grads)
        assert any(grad.abs().sum() > 0 for grad in grads)


def test_a_few_steps_lower_the_loss():
    model, prompt = tiny.refrag(), tiny.prompt(tiny.MIXED)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(8):
        with torch.enable_grad():
            loss = model(prompt=prompt, labels=prompt.token_ids).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(labels=torch.zeros(3, dtype=torch.int64)), r"labels: got torch.int64 \[3\], needs int64 \[48\]"),
        (dict(labels=torch.zeros(48)), "labels: got torch.float32"),
        (dict(labels=torch.zeros(48, dtype=torch.int64), logits_to_keep=1), "logits_to_keep: got 1 with labels"),
    ],
)
def test_bad_arguments_are_named(options, message):
    prompt = tiny.prompt(tiny.MIXED)
    assert prompt.layout.total_rows == 48
    with pytest.raises(ValueError, match=message):
        tiny.refrag()(prompt=prompt, **options)
