"""pool_chunks' CUDA kernel, run on the CPU, against float64."""

import itertools

import pytest
import torch

import refrag_kernels as rk
from tests.cuda_host import host_library
from tests.support.accuracy import DTYPES, OUTPUT, relative_error

pytestmark = pytest.mark.device_code

MODES = ("mean", "first", "last")


def run(hidden: torch.Tensor, offsets: torch.Tensor, mode: str, pack: int) -> torch.Tensor:
    out = host_library.guarded(torch.full((len(offsets) - 1, hidden.shape[1]), torch.nan, dtype=hidden.dtype))
    host_library.call(
        host_library.load("pooling"), "pool_chunks", hidden.dtype, pack, hidden, offsets, out,
        len(hidden), hidden.shape[1], hidden.stride(0), len(out), MODES.index(mode),
    )  # fmt: skip
    host_library.check_guard(out)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "first_column", "pack"), [(384, 0, 2), (40, 8, 2), (67, 1, 1)])
def test_against_float64(dtype, width, first_column, pack):
    torch.manual_seed(0)
    lengths = torch.randint(1, 20, (13,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    buffer = torch.full((int(lengths.sum()), width + 16), torch.nan, dtype=dtype)
    hidden = buffer[:, first_column : first_column + width]
    hidden.copy_(torch.randn(hidden.shape))
    for mode in MODES:
        expected = rk.pool_chunks(hidden.double(), offsets, mode, backend="reference")
        assert relative_error(run(hidden, offsets, mode, pack), expected) <= OUTPUT[dtype]


def test_a_bad_chunk_gives_zeros():
    hidden = torch.ones(8, 16)
    offsets = torch.tensor([0, 4, 3, 9, 8], dtype=torch.int32)
    for mode, pack in itertools.product(MODES, (1, 2)):
        assert run(hidden, offsets, mode, pack)[:, 0].tolist() == [1, 0, 0, 0]
