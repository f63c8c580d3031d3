"""The order of programs in Triton's kernels: each tile and column occurs once, and all orders give the same bits."""

import itertools

import pytest
import torch
import triton
import triton.language as tl

import refrag_kernels as rk
from refrag_kernels import grid_order
from refrag_kernels.grid_order import TILES_FIRST, Order
from refrag_kernels.plan_fields import PlanField
from refrag_kernels.triton_kernels import attention
from refrag_kernels.triton_kernels.tiles import tile_and_column
from tests.triton.modes import ALL


@triton.jit
def _places_kernel(p_places, section, ahead):
    tile, column = tile_and_column(section, ahead)
    at = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(p_places + at, tile)
    tl.store(p_places + at + 1, column)


def places(tiles, columns, section, ahead):
    """Return the place of each program, in the order of program ids, as defined in grid_order.py."""
    ahead = min(ahead, tiles)
    found = [(tile, column) for tile in range(ahead) for column in range(columns)]
    for first in range(0, columns, section):
        of_section = range(first, min(first + section, columns))
        found += [(tile, column) for tile in range(ahead, tiles) for column in of_section]
    return found


@pytest.mark.parametrize(("tiles", "columns"), [(1, 1), (5, 1), (1, 6), (4, 6), (7, 5)])
def test_places(tiles, columns):
    for section, ahead in itertools.product({1, 2, 4, columns}, {0, 3, tiles + 2}):
        section = min(section, columns)
        got = torch.full((tiles * columns, 2), -1, dtype=torch.int32)
        _places_kernel[(tiles, columns)](got, section, ahead)
        assert list(map(tuple, got.tolist())) == places(tiles, columns, section, ahead), (section, ahead)
    # The grid's own order, with the first axis varying fastest.
    assert places(tiles, columns, 1, 0) == [(tile, column) for column in range(columns) for tile in range(tiles)]


ORDERS = (
    Order(2, 7),  # does not divide three heads
    *((Order(1, 0), Order(1, 4), Order(2, 0), Order(3, 0)) if ALL else ()),
)


@pytest.mark.parametrize("group", (1, 4, 5, 11) if ALL else (1, 5))
def test_every_order_gives_the_same_bits(group):
    """Tiles of one block and of four, heads that don't fill a tile, and rows beyond the batch."""
    rows, capacity, heads = 50 + 1 + 30 + 20, 140, 3
    layout = rk.ChunkLayout.from_lengths([[50, 1, 30], [20]])
    mask = rk.ChunkMask.passages(torch.tensor([-1, 0, -1, -1]))
    limits = rk.PlanCapacity.for_rows(capacity, sequences=4, ranges_per_block=8)
    plan = rk.plan_attention(layout, mask, capacity=limits)
    generator = torch.Generator().manual_seed(group)
    q, k, v, grad = (torch.full((capacity, n, 16), torch.nan) for n in (heads * group, heads, heads, heads * group))
    for tensor in (q, k, v, grad):
        tensor[:rows] = torch.randn(rows, *tensor.shape[1:], generator=generator)
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def run():
        out, lse = rk.mixed_attention(*leaves, plan, return_lse=True, backend="triton")
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad)]

    with grid_order.use(TILES_FIRST):
        expected = run()
    assert all(not t[rows:].isnan().any() and t[:rows].isfinite().all() for t in expected)
    for order in ORDERS:
        with grid_order.use(order):
            assert all(torch.equal(a, b) for a, b in zip(run(), expected)), order
    assert all(torch.equal(a, b) for a, b in zip(run(), expected))  # all programs go ahead


@pytest.mark.parametrize("group", (1, 5))
def test_the_grid_is_the_same_in_every_order(group, monkeypatch):
    """With tiles first, the rest of the launch is the same too."""
    launches = []

    class Recorder:
        def __init__(self, kernel, first):
            self.names, self.first = kernel.arg_names, first

        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append((grid, dict(zip(self.names, args)) | kwargs))

    for name in ("mixed_attention_fwd_kernel", "mixed_attention_bwd_dq_kernel", "mixed_attention_bwd_dkv_kernel"):
        monkeypatch.setattr(attention, name, Recorder(getattr(attention, name), name))
    layout = rk.ChunkLayout.from_lengths([[300]])
    plan = rk.plan_attention(layout).tensors()
    q, k = torch.randn(300, 3 * group, 16), torch.randn(300, 3, 16)
    for order in (TILES_FIRST, Order(2, 264)):
        with grid_order.use(order):
            out, lse = attention.mixed_attention(q, k, k, plan, 1.0, 0.0, None)
            attention.mixed_attention_backward(out, lse, q, k, k, out, lse, plan, 1.0, 0.0, None)
    columns = 3 * (5 if group == 5 else 1)
    blocks = len(plan[PlanField.Q_BLOCKS])
    tiles = blocks if group >= 3 and group != 5 else -(-blocks // 4)
    for old, new in zip(launches[:2], launches[3:5]):
        assert old[0] == new[0] == (tiles, columns)
        assert (old[1]["section"], old[1]["ahead"]) == (1, 0)
        assert (new[1]["section"], new[1]["ahead"]) == (2 * columns // 3, -(-264 // columns))
    assert launches[2][0] == (5, 3) and launches[2][1]["TILES"] == 0
    assert launches[5][0] == (3, 5) and launches[5][1]["TILES"] == 1
