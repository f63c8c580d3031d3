"""The projection family's CUDA kernels, run thread by thread on the CPU, against float64."""

import pytest
import torch

from refrag_kernels.reference.projection import ACTIVATIONS
from tests.cuda_host import host_library
from tests.support.accuracy import DTYPES, OUTPUT, relative_error

pytestmark = pytest.mark.device_code

NAMES = ("none", "gelu", "gelu_tanh", "silu", "relu", "tanh")


def layer(x: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None, activation: str, **options):
    library = host_library.load("projection")
    out = host_library.guarded(torch.full((len(x), len(weights)), torch.nan, dtype=x.dtype))
    with host_library.options(library, **options):
        host_library.call(
            library,
            "small_m_projection",
            x.dtype,
            x,
            weights,
            bias,
            out,
            x.stride(0),
            weights.stride(0),
            host_library.ints([len(x), x.shape[1], len(weights)]),
            NAMES.index(activation),
        )
    host_library.check_guard(out)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "inner", "outer", "pad"),
    [(1, 8, 5, 0), (3, 40, 16, 8), (8, 1304, 33, 0), (13, 264, 40, 8), (32, 96, 17, 0), (64, 72, 24, 16)],
)
def test_small_m_projection(dtype, rows, inner, outer, pad):
    generator = torch.Generator().manual_seed(rows)
    # Padded rows; the padding is NaN.
    x, weights = (torch.full((n, inner + pad), torch.nan, dtype=dtype)[:, :inner] for n in (rows, outer))
    x.copy_(torch.randn(x.shape, generator=generator))
    weights.copy_(torch.randn(weights.shape, generator=generator) / inner**0.5)
    bias = torch.randn(outer, generator=generator).to(dtype) if rows % 2 else None
    for number, activation in enumerate(NAMES):
        wide = None if bias is None else bias.double()
        expected = ACTIVATIONS[activation][0](torch.nn.functional.linear(x.double(), weights.double(), wide))
        order = host_library.ORDERS[number % 3]
        assert relative_error(layer(x, weights, bias, activation, order=order), expected) <= OUTPUT[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "first_column", "pack"), [(136, 0, 2), (72, 8, 2), (67, 1, 1)])
def test_assembly(dtype, width, first_column, pack):
    generator = torch.Generator().manual_seed(0)
    buffer = torch.randn(60, width + 16 - width % 8, generator=generator).to(dtype)
    rows = buffer[:, first_column : first_column + width]
    table, projected = rows[:40], rows[40:47]
    ids = torch.randint(0, 40, (21,), generator=generator)
    slots = torch.full((21,), -1, dtype=torch.int32)
    slots[3:10], slots[15] = torch.arange(7, dtype=torch.int32), 2
    ids[3] = 10**12  # ignored: the row is a slot
    expected = table[ids.where(slots < 0, 0)].double() * 1.5
    expected[slots >= 0] = projected[slots[slots >= 0].long()].double()
    # A token and a slot out of range, and a negative number.
    ids[0], slots[20], slots[12] = 40, 7, -2
    expected[[0, 20, 12]] = 0
    out = host_library.guarded(torch.full((21, width), torch.nan, dtype=dtype))
    host_library.call(
        host_library.load("projection"),
        "assemble_mixed",
        dtype,
        pack,
        host_library.pointers(ids, table, projected, slots, out),
        host_library.int64s([21, 40, 7, width, table.stride(0), projected.stride(0)]),
        1.5,
    )
    host_library.check_guard(out)
    assert relative_error(out, expected) <= OUTPUT[dtype]
    assert (out[[0, 20, 12]] == 0).all()
