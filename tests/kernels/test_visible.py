"""visible_ranges against the chunk matrix of the specification."""

import random

import pytest
import torch

import refrag_kernels as rk
from refrag_kernels.reference.mask import allowed_pairs
from tests.support.factory import MASKS, random_lengths, random_mask


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", MASKS)
def test_ranges_are_the_rows_of_the_mask(kind, seed):
    rng = random.Random(seed)
    lengths = [[1], *random_lengths(rng)]
    layout, mask = rk.ChunkLayout.from_lengths(lengths), random_mask(rng, kind, lengths)
    rows = torch.tensor([rng.randrange(layout.total_rows) for _ in range(9)])
    visible = rk.visible_ranges(layout, mask, rows)
    allowed = allowed_pairs(layout, mask, causal=False)
    starts = layout.sequence_offsets.tolist()
    for i, row in enumerate(rows.tolist()):
        ranges = visible.ranges[visible.indptr[i] : visible.indptr[i + 1]].tolist()
        assert all(a[1] < b[0] for a, b in zip(ranges, ranges[1:])), "sorted, disjoint, merged"
        first = max(start for start in starts if start <= row)
        seen = {first + key for start, end in ranges for key in range(start, end)}
        assert seen == set(allowed[row].nonzero().flatten().tolist()), f"seed {seed}"


def test_out_is_filled_in_place():
    layout = rk.ChunkLayout.from_lengths([[2, 3, 4]])
    out = rk.VisibleRanges(torch.zeros(3, dtype=torch.int32), torch.full((5, 2), -1, dtype=torch.int32))
    assert rk.visible_ranges(layout, rk.ChunkMask.diagonal(), torch.tensor([0, 8]), out=out) is out
    assert out.indptr.tolist() == [0, 1, 2] and out.ranges.tolist() == [[0, 2], [5, 9]] + [[-1, -1]] * 3


@pytest.mark.parametrize(
    ("rows", "out", "error", "message"),
    [
        (torch.tensor([9]), None, IndexError, r"rows: got 9, needs a row in \[0, 9\)"),
        (torch.tensor([-1]), None, IndexError, "rows: got -1"),
        (torch.tensor([0.0]), None, ValueError, "rows: got shape"),
        (torch.tensor([0]), (3, 5), ValueError, r"out.indptr: got shape \[3\], needs \[2\]"),
        (torch.tensor([0]), (2, 0), ValueError, "out.ranges: got room for 0 ranges, needs 1"),
    ],
)
def test_bad_input(rows, out, error, message):
    layout = rk.ChunkLayout.from_lengths([[2, 3, 4]])
    if out is not None:
        out = rk.VisibleRanges(torch.zeros(out[0], dtype=torch.int32), torch.zeros(out[1], 2, dtype=torch.int32))
    with pytest.raises(error, match=message):
        rk.visible_ranges(layout, rk.ChunkMask.full(), rows, out)
