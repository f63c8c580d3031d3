"""Every op on a GPU against float64: the tests of the CPU backends, with GPU backends.

Tests of edge cases come first, then different ops alternate, so that a run that is cut short covers all of them.
"""

import itertools

import pytest
import torch

import refrag_kernels as rk
from tests.kernels import (
    test_append_kv,
    test_attention,
    test_attention_received,
    test_chunk_rows,
    test_merge_states,
    test_paged,
    test_pooling,
    test_projection,
)
from tests.support.accuracy import DTYPES, LSE, OUTPUT, relative_error
from tests.support.factory import random_attention_problem
from tests.support.nonfinite import spoilt_problem


def _cuda_attention(backend, dtype, seed):
    """Test the forward pass with head_dims that the C++ kernels support."""
    problem = random_attention_problem(seed, dtype, head_dims=(64, 96, 128))
    options = {**problem.options, "return_lse": True, "backend": backend}
    out, lse = rk.mixed_attention(problem.q, problem.k, problem.v, problem.plan_problem.plan(), **options)
    expected = problem.expected()
    assert relative_error(out, expected["out"]) <= OUTPUT[dtype], f"seed {seed}"
    assert relative_error(lse, expected["lse"]) <= LSE[dtype], f"seed {seed}"


def _attention(backend, dtype, seed):
    (_cuda_attention if backend == "cuda" else test_attention.test_against_float64)(backend, dtype, seed)


def _paged(backend, dtype, case):
    test_paged.test_equals_dense_float64(case, backend, dtype)


def _append(backend, dtype, case):
    test_append_kv.test_rows_land_in_their_places(case, backend, dtype)


def _merge(backend, dtype, shape):
    test_merge_states.test_equals_float64(shape, backend, dtype, strided=sum(shape) % 2 == 0)


def _merge_gradients(backend, dtype, shape):
    test_merge_states.test_gradients_equal_float64(shape, backend, dtype)


def _pooling(backend, dtype, mode_and_seed):
    test_pooling.test_against_float64(backend, dtype, *mode_and_seed)


def _received(backend, dtype, seed):
    test_attention_received.test_against_float64(backend, dtype, seed)


def _chunk_rows(backend, dtype, seed):
    test_chunk_rows.test_by_scores(backend, dtype, seed)
    for rotated in (False, True):
        test_chunk_rows.test_by_the_distance_from_the_mean(backend, dtype, seed, rotated)


def _projection(call):
    return lambda backend, dtype, seed: test_projection.test_against_float64(backend, dtype, seed, call)


BACKENDS = ("triton", "cuda")


OPS = {
    "mixed_attention": (_attention, range(24)),
    "paged_attention": (_paged, test_paged.CASES),
    "append_kv": (_append, test_append_kv.CASES),
    "merge_states": (_merge, test_merge_states.SHAPES),
    "merge_states_backward": (_merge_gradients, test_merge_states.SHAPES[:3]),
    "pool_chunks": (_pooling, [(mode, seed) for seed in range(6) for mode in test_pooling.MODES]),
    "attention_received": (_received, range(24)),
    "select_chunk_rows": (_chunk_rows, range(8)),
    "project_chunks": (_projection("project"), range(12)),
    "embed_mixed": (_projection("embed"), range(12)),
}
PROBLEMS = [
    pytest.param(op, backend, dtype, case, id=f"{op}-{backend}-{str(dtype)[6:]}-{number}")
    for number in range(max(len(cases) for _, cases in OPS.values()))
    for (op, (_, cases)), backend, dtype in itertools.product(OPS.items(), BACKENDS, DTYPES)
    # Triton alone has these.
    if backend != "cuda" or op not in ("merge_states_backward", "attention_received", "select_chunk_rows")
    for case in list(cases)[number : number + 1]
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_fully_masked_rows(backend):
    test_attention.test_fully_masked_rows(backend)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_worse_than_sdpa(backend, dtype):
    test_attention.test_no_worse_than_sdpa(backend, dtype, 105)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_out_of_sight_are_not_read(backend):
    test_paged.test_keys_out_of_sight_are_not_read(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_append_then_attend(backend):
    test_append_kv.test_append_then_attend(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_huge_and_nan_states(backend):
    test_merge_states.test_empty_states(backend)
    test_merge_states.test_huge_log_sums_do_not_overflow(backend)
    for nan in range(4):
        test_merge_states.test_nan_comes_through(nan, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_beyond_the_batch_under_a_capacity(dtype):
    test_attention.test_rows_beyond_the_batch_under_a_capacity_are_zero("triton", dtype)


def test_edges_of_attention_received():
    test_attention_received.test_masked_rows_and_keys("triton")
    test_attention_received.test_a_long_sequence("triton")
    test_attention_received.test_rows_beyond_the_batch_under_a_capacity_are_zero("triton", torch.bfloat16)
    for seed in range(10):
        test_attention_received.check_nonfinite(spoilt_problem(seed, torch.bfloat16), "triton")


def test_edges_of_select_chunk_rows():
    test_chunk_rows.test_equal_keys_are_ties_and_a_zero_key_is_neutral("triton")
    test_chunk_rows.test_nonfinite_keys_stay_in_their_chunk_and_head("triton")
    test_chunk_rows.test_a_long_chunk("triton")
    test_chunk_rows.test_rows_beyond_those_kept_are_zero("triton")


@pytest.mark.parametrize(("op", "backend", "dtype", "case"), PROBLEMS)
def test_against_float64(op, backend, dtype, case):
    OPS[op][0](backend, dtype, case)
