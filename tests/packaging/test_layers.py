"""The layers that replace plain functions through Hugging Face's ``kernels``."""

import pytest
import torch
from torch import nn

import refrag_kernels as rk
from refrag_kernels.layers import LAYERS, kernel_mapping

pytestmark = [pytest.mark.integrations, pytest.mark.cpp]
kernels = pytest.importorskip("kernels")

calls = []


@kernels.use_kernel_forward_from_hub("EmbedMixed")
def embed(token_ids, token_table, chunks, slot_of_row, w1, b1, w2, b2):
    calls.append("embed")
    projected = nn.functional.linear(nn.functional.gelu(nn.functional.linear(chunks, w1, b1)), w2, b2)
    rows = token_table[token_ids]
    return torch.where((slot_of_row >= 0)[:, None], projected[slot_of_row.clamp(min=0).long()], rows)


@kernels.use_kernel_forward_from_hub("MixedAttention")
def attend(q, k, v, plan, scale):
    """Plain causal attention over one sequence."""
    calls.append("attend")
    heads = (states.transpose(0, 1)[None] for states in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


@kernels.use_kernelized_func(embed, attend)
class Model(nn.Module):
    """A mixed sequence and one attention layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 32)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 32)

    def forward(self, token_ids, chunks, slot_of_row, plan):
        up, down = self.up, self.down
        rows = embed(token_ids, self.table.weight, chunks, slot_of_row, up.weight, up.bias, down.weight, down.bias)
        heads = rows.view(-1, 4, 8)
        return attend(heads, heads[:, :2], heads[:, 2:], plan, None)


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = Model()
    slots = torch.full((40,), -1, dtype=torch.int32)
    slots[5:9] = torch.tensor([2, 0, 3, 1], dtype=torch.int32)
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[5, 1, 1, 1, 1, 31]]))
    inputs = torch.randint(0, 20, (40,)), torch.randn(4, 8), slots, plan
    calls.clear()
    yield model, inputs
    kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")  # back to the plain functions


def gradients(model, inputs):
    model.zero_grad()
    model(*inputs).square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("mode", ["INFERENCE", "TRAINING"])
def test_the_ops_take_the_place_of_plain_functions(problem, mode):
    model, inputs = problem
    expected, expected_gradients = model(*inputs), gradients(model, inputs)
    assert set(calls) == {"embed", "attend"}
    with kernels.use_kernel_mapping(kernel_mapping()):
        kernels.kernelize(model, mode=kernels.Mode[mode], device="cpu")
    calls.clear()
    torch.testing.assert_close(model(*inputs), expected, atol=1e-5, rtol=1e-5)
    for got, wanted in zip(gradients(model, inputs), expected_gradients):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert not calls


@pytest.mark.compiles
def test_under_compile(problem):
    model, inputs = problem
    expected = model(*inputs)
    with kernels.use_kernel_mapping(kernel_mapping()):
        kernels.kernelize(
            model, mode=kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE, device="cpu",
            use_fallback=kernels.KernelizeFallback.NONE,
        )  # fmt: skip
    calls.clear()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=1e-5)
    assert not calls


def test_each_layer_serves_each_device():
    for name, devices in kernel_mapping().items():
        assert set(devices) == {"cpu", "cuda", "rocm"}
        assert {repository.load() for repository in devices.values()} == {LAYERS[name]}
