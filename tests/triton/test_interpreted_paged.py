"""paged_attention, append_kv and merge_states with Triton's kernels in the interpreter, against float64."""

import pytest
import torch
import triton.language as tl

import refrag_kernels as rk
from refrag_kernels.triton_kernels import nonfinite, paged
from tests.kernels import test_append_kv, test_merge_states, test_nonfinite, test_paged
from tests.support import paged_problems
from tests.support.nonfinite import spoilt_paged
from tests.triton.modes import ALL

DTYPES = paged_problems.LOW_DTYPES if ALL else (torch.float32,)
CASES = {
    "decode", "prefill", "empty sequence with a row", "no rows", "9/3 heads", "D 40, prefill", "page of 7, prefill",
    "window over splits", "window, prefill", "sinks, prefill", "visible", "visible, window, sinks, softcap", "strided",
}  # fmt: skip
SHAPES = test_merge_states.SHAPES if ALL else [s for s in test_merge_states.SHAPES if s[0] * s[1] < 100]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in test_paged.CASES if ALL or case in CASES])
def test_attention_equals_dense_float64(case, dtype):
    test_paged.test_equals_dense_float64(case, "triton", dtype)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_attention_in_16_bits(dtype):
    test_paged.test_equals_dense_float64("visible, prefill", "triton", dtype)


@pytest.mark.parametrize("seed", range(12) if ALL else (4,))
def test_random_shapes(seed):
    test_paged.test_random_shapes(seed, "triton")


@pytest.mark.parametrize("dtype", paged_problems.LOW_DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(60) if ALL else range(8))
def test_where_nan_goes(seed, dtype, monkeypatch):
    """The equivalent of tests/kernels/test_nonfinite.py for the other backends."""
    monkeypatch.setattr(nonfinite, "REPAIR_ROWS", tl.constexpr(16))  # 16 rows take the interpreter as long as one
    spoilt = spoilt_paged(seed, dtype)
    spoilt.check(*rk.paged_attention(*spoilt.problem.args, **spoilt.problem.options, return_lse=True, backend="triton"))


def test_nan_is_attended_to():
    test_nonfinite.test_a_key_of_nan_is_not_a_key_that_is_not_seen("triton")
    test_nonfinite.test_merge_states("triton")


@pytest.mark.parametrize("case", ("decode", "prefill", "visible, window, sinks, softcap"))
def test_keys_in_parts(case, monkeypatch):
    """As many parts as a long table is split into, on a short one."""
    monkeypatch.setattr(paged, "_MIN_SPLIT_KEYS", 1)
    for max_keys in (1, 70, 5000):
        parts, keys = paged.splits_of(1, max_keys, 32)
        assert parts <= 32 and keys % 32 == 0 and (parts - 1) * keys < max_keys <= parts * keys
    assert paged.splits_of(8, 70, 32) == (3, 32) and paged.splits_of(1000, 70, 32) == (1, 96)
    test_paged.test_equals_dense_float64(case, "triton", torch.float32)


def test_keys_out_of_sight_are_not_read():
    test_paged.test_keys_out_of_sight_are_not_read("triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", test_append_kv.CASES)
def test_rows_land_in_their_places(case, dtype):
    test_append_kv.test_rows_land_in_their_places(case, "triton", dtype)


def test_append_then_attend():
    test_append_kv.test_append_then_attend("triton")


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", paged_problems.LOW_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merge_equals_float64(shape, dtype, strided):
    test_merge_states.test_equals_float64(shape, "triton", dtype, strided)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_merge_gradients_equal_float64(shape):
    test_merge_states.test_gradients_equal_float64(shape, "triton", torch.float32)


def test_merge_of_empty_huge_and_nan():
    test_merge_states.test_empty_states("triton")
    test_merge_states.test_huge_log_sums_do_not_overflow("triton")
    for nan in range(4):
        test_merge_states.test_nan_comes_through(nan, "triton")


def test_opcheck():
    test_paged.test_opcheck("decode", "triton")
    test_append_kv.test_opcheck("triton")
    test_merge_states.test_opcheck("triton")
