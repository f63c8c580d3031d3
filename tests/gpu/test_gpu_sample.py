"""A small call of each op for compute-sanitizer, under which a kernel takes seconds."""

import pytest
import torch

from tests.gpu import test_gpu_ops

# Indices of small but informative cases in the tables of test_gpu_ops: with gradients, windows, ranges.
NUMBERS = {"mixed_attention": 6, "paged_attention": 26, "pool_chunks": 3, "project_chunks": 4, "embed_mixed": 4}


@pytest.mark.parametrize("backend", test_gpu_ops.BACKENDS)
@pytest.mark.parametrize("op", test_gpu_ops.OPS)
def test_sample(op, backend):
    check, cases = test_gpu_ops.OPS[op]
    check(backend, torch.bfloat16, list(cases)[NUMBERS.get(op, 1)])
