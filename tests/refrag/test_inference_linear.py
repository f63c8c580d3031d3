"""Linear layers for inference: equal results, and torch's own product in all other cases."""

import copy
import pickle

import pytest
import torch
from refrag.model import inference_linear
from refrag.model.inference_linear import is_inference_linear, use_inference_linears
from torch import nn

from tests.refrag import tiny
from tests.support.accuracy import relative_error


@pytest.fixture
def calls(monkeypatch):
    """Count the rows that the kernel computes."""
    rows = []

    def counting(x, weight, bias):
        rows.append(len(x))
        return kernel(x, weight, bias)

    kernel = inference_linear.cpu_linear_rows
    monkeypatch.setattr(inference_linear, "cpu_linear_rows", counting)
    return rows


@pytest.mark.parametrize("name", tiny.DECODERS)
def test_a_decode_step_equals_the_plain_decoders(name, decoders, calls):
    plain, ours = decoders[name], copy.deepcopy(decoders[name])
    changed = use_inference_linears(ours)
    assert changed == sum(isinstance(layer, nn.Linear) for layer in plain.modules()) > 15
    ids = torch.randint(3, tiny.VOCABULARY, (1, 24))
    logits = []
    for model in (plain, ours):
        cache = model(ids[:, :20]).past_key_values
        logits += [torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(20, 24)])]
    assert relative_error(logits[1], logits[0]) < 1e-5
    assert calls == [1] * 4 * changed
    assert ours.state_dict().keys() == plain.state_dict().keys()
    # Prompts and decode steps with beams.
    calls.clear()
    assert relative_error(ours(ids).logits, plain(ids).logits) < 1e-5 and not calls
    assert relative_error(ours(ids[:, :2].repeat(3, 1)).logits, plain(ids[:, :2].repeat(3, 1)).logits) < 1e-5
    assert set(calls) == {6}


def test_generation_uses_it(calls):
    model = tiny.refrag()
    assert all(is_inference_linear(layer) for layer in model.decoder.modules() if isinstance(layer, nn.Linear))
    model.generate(tiny.prompt(tiny.MIXED[:1]), max_new_tokens=3, do_sample=False)
    assert set(calls) == {1}


def test_other_cases_use_torchs_product(calls):
    layer = nn.Sequential(nn.Linear(6, 5))
    use_inference_linears(layer)
    x = torch.randn(2, 6)
    with torch.enable_grad():
        layer(x).sum().backward()
        assert layer[0].weight.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer.to(dtype)
        rows = torch.randn(3, 3, 6).to(dtype)
        expected = nn.functional.linear(rows.double(), layer[0].weight.double(), layer[0].bias.double())
        assert relative_error(layer(rows), expected) < (2e-6 if dtype == torch.float32 else 8e-3)
    layer.double()(x.double())
    assert not calls
    with pytest.raises(RuntimeError):  # torch's own message
        layer(x)
    assert torch.compile(layer.float(), fullgraph=True, backend="eager")(x).shape == (2, 5) and not calls
    assert layer(x).shape == (2, 5) and layer(x[0]).shape == (5,) and calls == [2, 1]


def test_it_can_be_copied_and_pickled():
    layer = nn.Sequential(nn.Linear(6, 5))
    use_inference_linears(layer)
    x = torch.randn(1, 6)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert is_inference_linear(twin[0]) and torch.equal(twin(x), layer(x))
        twin[0].weight.add_(1)
        assert not torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("rows", [2, 30])
def test_unsupported_input_uses_torchs_product(calls, rows):
    layer = nn.Linear(6, 5)
    plain = copy.deepcopy(layer)
    use_inference_linears(layer)
    x = torch.randn(rows, 12)
    for strided in (x[:, ::2], x.T[:6].T, x[:, :6], torch.randn(6, rows).T, x[:0, :6]):
        assert torch.equal(layer(strided), plain(strided)) and not calls
    for own, other in ((torch.randn(6, 5).T, None), (layer.weight.data, torch.randn(10)[::2])):
        for changed in (layer, plain):
            changed.weight = nn.Parameter(own)
            changed.bias = None if other is None else nn.Parameter(other)
        assert torch.equal(layer(x[:, :6].contiguous()), plain(x[:, :6].contiguous())) and not calls
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.randn(6, 12))


def test_tensor_subclasses_use_their_own_product(calls):
    class Wrapped(torch.Tensor):
        """A tensor that stores its data elsewhere, as quantised and sharded tensors do."""

        @staticmethod
        def __new__(cls, held):
            return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

        def __init__(self, held):
            self.held = held

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            def bare(value):
                return value.held if isinstance(value, cls) else value

            result = func(*torch.utils._pytree.tree_map(bare, args), **(kwargs or {}))
            return cls(result) if func is torch.ops.aten.detach.default else result

    layer = nn.Linear(6, 5, bias=False)
    use_inference_linears(layer)
    x, held = torch.randn(2, 6), layer.weight.data
    layer.weight = nn.Parameter(Wrapped(held), requires_grad=False)
    assert torch.allclose(layer(x), x @ held.T) and not calls


def test_quantize_dynamic_finds_the_layers():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    use_inference_linears(model)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert [type(layer).__module__ for layer in quantized[::2]] == ["torch.ao.nn.quantized.dynamic.modules.linear"] * 2
    x = torch.randn(4, 6)
    assert (quantized(x) - model(x)).abs().max() < 0.1


def test_without_the_kernels_nothing_changes(monkeypatch):
    monkeypatch.setattr(inference_linear.extension, "cpu_missing", lambda: "not built")
    layer = nn.Linear(2, 2)
    assert use_inference_linears(layer) == 0 and type(layer) is nn.Linear
