"""Compile every kernel for GPUs that are not present: no spills, shared memory fits, matrix instructions are used."""

import pytest
import torch
import triton
import triton.language as tl

from bench.static import ahead_of_time, resources
from bench.static.launches import CASES
from refrag_kernels.architectures import ARCHITECTURES, TRITON
from tests.triton.modes import ALL

# sm_86 has nearly the kernels of sm_80 and the memory of sm_120, so only `make test-gpu-proof` covers it, without
# float16.
TARGETS = [
    pytest.param(case, architecture, id=f"{case}-{architecture}")
    for case in CASES
    for architecture in TRITON
    if (ALL or case.always) and (architecture != "sm_86" or ALL and case.dtype != torch.float16)
]


@pytest.mark.parametrize(("case", "architecture"), TARGETS)
def test_resources(case, architecture):
    recorded = ahead_of_time.record(case.call, architecture)
    assert recorded
    limits = ARCHITECTURES[architecture]
    for launch in recorded:
        built = ahead_of_time.build(launch, architecture)
        what = f"{launch.kernel.__name__} {launch.options} on {architecture}: {built}"
        assert built.shared <= limits.shared_memory_per_cta, what
        assert case.spills_reported or not built.spilled, what
        # Eight warps are two per scheduler, so that one computes while the other waits.
        blocks = limits.resident_ctas(built.registers, built.shared, built.warps)
        assert blocks >= 1, what
        assert case.spills_reported or built.warps * blocks >= (4 if architecture == "gfx942" else 8), what
        if case.dtype == torch.float32:
            # AMD's matrix instructions support float32; NVIDIA's need three passes of TF32.
            assert set(built.products) <= {"ieee" if architecture == "gfx942" else "tf32x3"}, what
        elif built.products:
            # Below 64 rows, sm_90 and sm_100 use the instruction of sm_80.
            wanted = {limits.matrix_instruction} | ({"HMMA"} if resources.tile_rows(launch) < 64 else set())
            assert any(built.matrix.get(name) for name in wanted), what


@triton.jit
def _scaled(p_x, n, scale, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_x + at, scale * tl.load(p_x + at, mask=at < n), mask=at < n)


@triton.jit
def _scaled_by_other_names(p_rows, count, factor, WIDTH: tl.constexpr):
    # The same, with a comment.
    place = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    tl.store(p_rows + place, factor * tl.load(p_rows + place, mask=place < count), mask=place < count)


@triton.jit
def _doubled(p_x, n, scale, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_x + at, 2 * scale * tl.load(p_x + at, mask=at < n), mask=at < n)


def test_only_what_computes_something_else_is_compiled_again(tmp_path, monkeypatch):
    def built(kernel):
        (launch,) = ahead_of_time.record(lambda: kernel[(1,)](torch.zeros(64), 64, 0.5, 64), "sm_90")
        return ahead_of_time.build(launch, "sm_90", tmp_path)

    first = built(_scaled)
    compiled = []
    compile_launch = ahead_of_time.compile_launch
    monkeypatch.setattr(
        ahead_of_time, "compile_launch", lambda *launch: compiled.append(launch) or compile_launch(*launch)
    )
    assert built(_scaled) == built(_scaled_by_other_names) == first and not compiled
    built(_doubled)
    assert len(compiled) == 1
