"""select_chunk_rows with Triton's kernels in the interpreter, against a literal choice."""

import pytest
import torch

import refrag_kernels as rk
from refrag_kernels.triton_kernels import chunk_rows
from tests.kernels import test_chunk_rows as kernels
from tests.triton.modes import ALL
from tests.triton.test_interpreted_bounds import guarded


@pytest.mark.parametrize("seed", range(16) if ALL else (1, 2))
@pytest.mark.parametrize("dtype", kernels.DTYPES if ALL else (torch.float32, torch.bfloat16), ids=str)
def test_by_scores(dtype, seed):
    kernels.test_by_scores("triton", dtype, seed)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("seed", range(16) if ALL else (2, 5))
@pytest.mark.parametrize("dtype", kernels.DTYPES if ALL else (torch.float32, torch.bfloat16), ids=str)
def test_by_the_distance_from_the_mean(dtype, seed, rotated):
    kernels.test_by_the_distance_from_the_mean("triton", dtype, seed, rotated)


def test_ties_and_nonfinite_keys():
    kernels.test_equal_keys_are_ties_and_a_zero_key_is_neutral("triton")
    kernels.test_nonfinite_keys_stay_in_their_chunk_and_head("triton")


def test_lengths_of_all_kinds():
    kernels.check_long_chunk("triton", 40)
    kernels.test_rows_beyond_those_kept_are_zero("triton")
    kernels.test_empty("triton")


def test_strides_and_opcheck():
    kernels.test_strided_offsets_and_tables("triton")
    kernels.test_opcheck("triton", True)
    kernels.test_opcheck("triton", False)


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize(
    ("offsets", "kept", "good"),
    [
        ([0, 4, 9, 6], [0, 1, 2, 3], [0]),  # a chunk that leaves the rows, and one that ends before it starts
        ([-1, 4, 6], [0, 1, 3], [1, 2]),
        ([0, 4, 6], [0, 5, 6], [5]),  # more rows than there are
        ([0, 4, 6], [2, 3, 4], [2, 3]),
        ([0, 4, 6], [-2, 0, 2], [0, 1]),
        ([0, 4, 6], [0, 2, 9], [0, 1]),
    ],
)
def test_offsets_that_leave_the_rows_make_zeros(offsets, kept, good, scored, monkeypatch):
    untouched = guarded(monkeypatch, chunk_rows)
    k = torch.randn(6, 2, 8)
    scores = torch.randn(6, 2) if scored else None
    tables = [torch.tensor(values, dtype=torch.int32) for values in (offsets, kept)]
    k_kept, v_kept, rows = rk.select_chunk_rows(k, k, *tables, 6, scores, backend="triton")
    for row in range(6):
        if row in good:
            assert (rows[row] >= 0).all() and torch.equal(k_kept[row, 0], k[rows[row, 0]][0])
        else:
            assert (rows[row] == -1).all() and not k_kept[row].any() and not v_kept[row].any(), row
    assert untouched()
