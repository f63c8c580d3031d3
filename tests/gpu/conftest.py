"""Run the tests of the ops on a GPU: an op's arguments are moved to the GPU, and its results back to the CPU.

Views stay views: a tensor's whole storage is moved. Without a GPU nothing is collected, unless REFRAG_GPU_TESTS=cpu
requests a dry run with Triton's interpreter, which ``python -m ttsem.sanitize pytest`` replaces with ttsem.
"""

import os

import pytest
import torch

import refrag_kernels as rk
from bench.cases.ops import GPU_OPS
from refrag_kernels import registration
from tests.support import triton_on_cpu

DRY_RUN = triton_on_cpu.TTSEM or (os.environ.get("REFRAG_GPU_TESTS") == "cpu" and triton_on_cpu.INTERPRETED)
DEVICE = "cpu" if DRY_RUN else "cuda"
collect_ignore_glob = [] if DRY_RUN or torch.cuda.is_available() else ["test_*.py"]


class Move:
    """Moves a call's arguments. Tensors that share a storage on the CPU share one on the device."""

    def __init__(self):
        self.storages = {}

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of a tensor on the device, with the same strides and storage offset."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.storages:
            self.storages[storage.data_ptr()] = storage.clone() if DEVICE == "cpu" else storage.cuda()
        there = torch.empty(0, dtype=tensor.dtype, device=DEVICE)
        return there.set_(self.storages[storage.data_ptr()], tensor.storage_offset(), tensor.shape, tensor.stride())

    def __call__(self, value):
        if isinstance(value, rk.AttentionPlan):
            return value.to(DEVICE)
        if isinstance(value, torch.Tensor):
            return _Differentiable.apply(value, self) if value.requires_grad else self.tensor(value)
        if isinstance(value, (tuple, list)):
            there = map(self, value)
            return type(value)(*there) if hasattr(value, "_fields") else type(value)(there)
        return value


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, move):
        return move.tensor(tensor.detach())

    @staticmethod
    def backward(ctx, grad):
        return grad.cpu(), None


def _from_device(value):
    if isinstance(value, (tuple, list)):
        return type(value)(_from_device(item) for item in value)
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _on_device(name, served):
    op = getattr(rk, name)

    def call(*args, **options):
        wanted = options.get("backend")
        if wanted is None:  # the expected result
            return op(*args, **options)
        # The C++ kernels leave attention's gradients, and calls they don't support, to Triton.
        options["backend"] = "cuda,triton" if wanted == "cuda" else wanted
        move = Move()
        there = [move(value) for value in args]
        result = op(*there, **{key: move(value) for key, value in options.items()})
        if DEVICE == "cuda":
            torch.cuda.synchronize()  # attributes a fault to this call
        if served[name] != wanted:
            pytest.skip(f"{wanted} leaves this call of {name} to {served[name]}")
        if name == "append_kv":
            # The whole storage, to detect stray writes outside the view.
            for here, pages in zip(args[2:4], there[2:4]):
                here.untyped_storage().copy_(pages.untyped_storage())
        return _from_device(result)

    return call


@pytest.fixture(autouse=True)
def ops_on_the_device(monkeypatch):
    """Run the public ops on the device, and skip a test if its backend leaves the call to another."""
    if DRY_RUN:
        triton_on_cpu.install(monkeypatch)
    served = {}
    select = registration.select

    def spied(op, *args):
        chosen = select(op, *args)
        served[op.name] = chosen.backend
        return chosen

    monkeypatch.setattr(registration, "select", spied)
    for name in GPU_OPS:
        monkeypatch.setattr(rk, name, _on_device(name, served))
