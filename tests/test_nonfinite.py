"""A NaN or inf in queries, keys or values reaches only the rows that attend to it, in every backend."""

import pytest
import torch
from accuracy import DTYPES
from nonfinite import spoilt_problem

from refrag_kernels import backends

BACKENDS = backends.available("mixed_attention", "attention", torch.device("cpu"))


@pytest.mark.parametrize("first_seed", range(0, 40, 10))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_attention(backend, dtype, first_seed):
    for seed in range(first_seed, first_seed + 10):
        problem = spoilt_problem(seed, dtype)
        try:
            problem.check(problem.spoilt.run(backend))
        except AssertionError as error:
            raise AssertionError(f"spoilt_problem({seed}, {dtype}): {error}") from error
