"""pool_chunks on CUDA: its device and shapes without a GPU, and its values if there is one."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import refrag_kernels as rk
from refrag_kernels.support import OPS

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fake_cuda_tensors(dtype):
    with FakeTensorMode():
        hidden = torch.empty(12, 8, dtype=dtype, device="cuda")
        pooled = rk.pool_chunks(hidden, torch.empty(4, dtype=torch.int32, device="cuda"), "mean")
    assert pooled.shape == (3, 8) and pooled.dtype == dtype and pooled.device.type == "cuda"


def test_float64_is_left_to_the_reference():
    double = [torch.zeros(1, 1, dtype=torch.float64), None, "mean"]
    assert OPS["pool_chunks"].implementations["cuda"].unsupported(double) == "dtype float64"


@needs_gpu
@pytest.mark.parametrize(("width", "first_column"), [(384, 0), (576, 8), (67, 1), (4096, 0)])
def test_against_the_reference(width, first_column):
    lengths = torch.randint(1, 40, (200,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int().cuda()
    for dtype, mode in itertools.product((torch.float32, torch.bfloat16, torch.float16), ("mean", "first", "last")):
        # A view with padded rows and, with first_column 1, without 16-byte alignment.
        buffer = torch.randn(int(lengths.sum()), width + 16, device="cuda", dtype=dtype)
        hidden = buffer[:, first_column : first_column + width]
        pooled = rk.pool_chunks(hidden, offsets, mode, backend="cuda")
        expected = rk.pool_chunks(hidden.double(), offsets, mode, backend="reference")
        error = (pooled.double() - expected).norm() / expected.norm()
        assert error <= (2e-6 if dtype == torch.float32 else 4e-3), (dtype, mode)


@needs_gpu
def test_a_bad_chunk_gives_zeros_or_an_error(monkeypatch):
    hidden = torch.ones(8, 16, device="cuda")
    offsets = torch.tensor([0, 4, 3, 9, 8], dtype=torch.int32, device="cuda")
    pooled = rk.pool_chunks(hidden, offsets, "mean", backend="cuda")
    assert pooled[:, 0].tolist() == [1, 0, 0, 0]
    monkeypatch.setenv("REFRAG_KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match="chunk_offsets"):
        rk.pool_chunks(hidden, offsets, "mean", backend="cuda")
