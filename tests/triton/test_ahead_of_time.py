"""Every kernel compiled for GPUs that are not at hand: no spills, shared memory that fits, matrix instructions."""

import re

import ahead_of_time
import pytest
import torch
from cases import CASES
from modes import ALL

from refrag_kernels.triton_kernels.launch import SHARED_MEMORY

# sm_86 has the kernels of sm_80 with the memory of sm_120, or nearly: `make test` leaves it to `make test-triton`.
ARCHITECTURES = list(SHARED_MEMORY) if ALL else [name for name in SHARED_MEMORY if name != "sm_86"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", [case for case in CASES if ALL or case.always], ids=str)
def test_resources(case, architecture):
    launches = ahead_of_time.record(case.call, architecture)
    assert launches
    for launch in launches:
        built = ahead_of_time.build(launch, architecture)
        what = f"{launch.kernel.__name__} {launch.options} on {architecture}: {built._replace(ttir='')}"
        assert built.shared <= SHARED_MEMORY[architecture], what
        assert case.spills_reported or not built.spilled, what
        products = re.findall(r"tt\.dot .*", built.ttir)
        if case.dtype == torch.float32:
            # IEEE is what a product without a precision is.
            wanted = "inputPrecision = tf32x3" if architecture != "gfx942" else ""
            assert all(wanted in line and ("tf32" in line) == bool(wanted) for line in products), products
        elif products and case.matrix:
            assert any(built.matrix.get(name) for name in ahead_of_time.MATRIX[architecture]), what
