"""The order of programs: how many heads form a section."""

import pytest
import torch

from refrag_kernels import grid_order
from refrag_kernels.grid_order import TILES_FIRST, Order


def keys(rows, heads, head_dim=128, dtype=torch.bfloat16):
    return torch.empty(rows, heads, head_dim, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("rows", "heads", "section"),
    [
        (4096, 8, 8),  # 2 MiB per head, of 25 MiB
        (4096, 32, 11),  # 12 fit: three sections of 11, 11 and 10
        (4096, 25, 9),  # not 12, 12 and 1
        (16384, 8, 3),
        (65536, 8, 1),
        (1 << 20, 1, 1),
        (0, 3, 3),
    ],
)
def test_sections_fit_half_of_the_cache_and_are_alike(rows, heads, section):
    k = keys(rows, heads)
    order = grid_order.order_of(k)
    assert order == Order(section, 264)
    whole = 2 * rows * 128 * 2
    assert section == 1 or section * whole <= grid_order._L2_BYTES // 2
    assert section == heads or (section + 1) * -(-heads // section) > heads


def test_a_device_has_its_own_cache(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(grid_order, "_l2_bytes", lambda index: 8 << 20)
    assert grid_order.order_of(keys(4096, 8)).section == 2


@pytest.mark.parametrize(
    ("known", "expected"), [({}, 50 << 20), ({"L2_cache_size": 0}, 50 << 20), ({"L2_cache_size": 7}, 7)]
)
def test_where_torch_does_not_know_the_cache(monkeypatch, known, expected):
    properties = type("Properties", (), known)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert grid_order._l2_bytes.__wrapped__(0) == expected


def test_columns_and_tiles():
    assert Order(2, 264).columns(columns=8, kv_heads=8) == (2, 33)
    assert Order(2, 264).columns(columns=40, kv_heads=8) == (10, 7)  # five programs share a key/value head
    assert TILES_FIRST.columns(columns=40, kv_heads=8) == (1, 0)


def test_an_order_is_forced_within_a_block():
    k = keys(4096, 8)
    chosen = grid_order.order_of(k)
    with grid_order.use(TILES_FIRST):
        assert grid_order.order_of(k) == TILES_FIRST and not grid_order.heads_first()
        with grid_order.use(Order(3, 1)):
            assert grid_order.order_of(k) == (3, 1) and grid_order.heads_first()
        assert grid_order.order_of(k) == TILES_FIRST
    assert grid_order.order_of(k) == chosen and grid_order.heads_first()
