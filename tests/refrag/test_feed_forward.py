"""The encoder's fused feed-forward layers equal transformers' own."""

import copy
import io
import pickle

import pytest
import torch
from refrag.model.feed_forward import fuse_feed_forward
from transformers import AutoModel, XmodConfig

from tests.refrag import tiny
from tests.support.accuracy import relative_error


def hidden_states(model, tokens):
    return model(input_ids=tokens).last_hidden_state


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_outputs_and_gradients_equal_the_unfused(name):
    plain, fused = tiny.encoder(name), tiny.encoder(name)
    assert fuse_feed_forward(fused) == fused.config.num_hidden_layers
    tokens = torch.randint(3, tiny.VOCABULARY, (3, 20))
    assert relative_error(hidden_states(fused, tokens), hidden_states(plain, tokens)) < 2e-6
    plain, fused = plain.double(), fused.double()
    with torch.enable_grad():
        want, got = hidden_states(plain, tokens), hidden_states(fused, tokens)
    assert relative_error(got, want) < 1e-12
    upstream = torch.randn_like(want)
    want.backward(upstream), got.backward(upstream)
    for (parameter, a), (_, b) in zip(plain.named_parameters(), fused.named_parameters()):
        if a.grad is not None:
            assert relative_error(b.grad, a.grad, upstream) < 1e-12, parameter


def test_the_op_computes_it(monkeypatch):
    fused = tiny.encoder("bert")
    fuse_feed_forward(fused)
    calls = []
    project = torch.ops.refrag.project_chunks
    monkeypatch.setattr(
        "refrag_kernels.project_chunks", lambda *a, **k: calls.append(1) or project(*a, k["activation"], None)
    )
    hidden_states(fused, torch.tensor([[5, 6]]))
    assert len(calls) == fused.config.num_hidden_layers


def _through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _through_torch_save]
)
def test_a_copy_uses_its_own_weights(copied):
    fused = tiny.encoder("bert")
    fuse_feed_forward(fused)
    tokens = torch.tensor([[5, 6, 7]])
    twin, before = copied(fused), hidden_states(fused, tokens)
    assert torch.equal(hidden_states(twin, tokens), before)
    with torch.no_grad():
        twin.encoder.layer[0].output.dense.weight.zero_()
    assert torch.equal(hidden_states(fused, tokens), before)
    assert not torch.equal(hidden_states(twin, tokens), before)


def test_replaced_linear_layers_are_respected():
    class Doubled(torch.nn.Linear):
        def forward(self, rows):
            return 2 * super().forward(rows)

    plain, fused = tiny.encoder("bert"), tiny.encoder("bert")
    fuse_feed_forward(fused)
    for model in (plain, fused):
        model.encoder.layer[1].intermediate.dense.__class__ = Doubled
    tokens = torch.tensor([[5, 6, 7]])
    assert relative_error(hidden_states(fused, tokens), hidden_states(plain, tokens)) < 2e-6


def test_layers_with_modules_in_between_are_unchanged():
    config = XmodConfig(**{**tiny._ENCODER, "default_language": "en_XX", "pad_token_id": 0})
    plain = AutoModel.from_config(config).eval()
    tiny._spread(plain)
    fused, tokens = copy.deepcopy(plain), torch.tensor([[5, 6, 7]])
    assert fuse_feed_forward(fused) == 0  # adapters
    assert torch.equal(hidden_states(fused, tokens), hidden_states(plain, tokens))


def test_other_encoders_and_activations_are_unchanged():
    assert fuse_feed_forward(tiny.encoder("modernbert")) == 0
    unknown = tiny.encoder("bert")
    unknown.config.hidden_act = "mish"
    assert fuse_feed_forward(unknown) == 0
