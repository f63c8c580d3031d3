"""Every kernel compiled for GPUs that are not at hand: no spills, shared memory that fits, matrix instructions."""

import pytest
import torch

from bench.static import ahead_of_time, resources
from bench.static.launches import CASES
from refrag_kernels.triton_kernels.launch import SHARED_MEMORY
from tests.triton.modes import ALL

# sm_86 has the kernels of sm_80 with the memory of sm_120, or nearly: `make test` leaves it to `make test-gpu-proof`,
# which leaves out its float16.
TARGETS = [
    pytest.param(case, architecture, id=f"{case}-{architecture}")
    for case in CASES
    for architecture in SHARED_MEMORY
    if (ALL or case.always) and (architecture != "sm_86" or ALL and case.dtype != torch.float16)
]


@pytest.mark.parametrize(("case", "architecture"), TARGETS)
def test_resources(case, architecture):
    recorded = ahead_of_time.record(case.call, architecture)
    assert recorded
    for launch in recorded:
        built = ahead_of_time.build(launch, architecture)
        what = f"{launch.kernel.__name__} {launch.options} on {architecture}: {built}"
        assert built.shared <= SHARED_MEMORY[architecture], what
        assert case.spills_reported or not built.spilled, what
        # Eight warps are two for each scheduler, so that one computes while the other waits.
        blocks = resources.occupancy(architecture, built.registers, built.shared, built.warps)
        assert blocks >= 1, what
        assert case.spills_reported or built.warps * blocks >= (4 if architecture == "gfx942" else 8), what
        if case.dtype == torch.float32:
            # AMD's matrix instructions take float32 as it is; NVIDIA's take three passes of TF32.
            assert set(built.products) <= {"ieee" if architecture == "gfx942" else "tf32x3"}, what
        elif built.products:
            # Below 64 rows sm_90 and sm_100 have the instruction of sm_80.
            wanted = {ahead_of_time.MATRIX[architecture]} | ({"HMMA"} if resources.tile_rows(launch) < 64 else set())
            assert any(built.matrix.get(name) for name in wanted), what
