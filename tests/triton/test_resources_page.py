"""Values computed from the compiled kernels: the occupancy, and the page with the results."""

import dataclasses

import pytest
import triton

from bench.static import ahead_of_time, resources
from bench.static.launches import CASES
from bench.static.resources import Row
from refrag_kernels.architectures import ARCHITECTURES
from tests.triton.modes import ALL


@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "warps", "blocks"),
    [
        # Results of NVIDIA's occupancy calculator for these launches.
        ("sm_80", 32, 0, 4, 16),  # limited by warps, 64
        ("sm_80", 255, 0, 4, 2),  # limited by registers: 256 for each of 128 threads, twice
        ("sm_80", 168, 0, 4, 3),
        ("sm_80", 32, 163 << 10, 4, 1),
        ("sm_90", 128, 113 << 10, 8, 2),  # limited by both shared memory and registers
        ("sm_120", 40, 20 << 10, 4, 4),  # limited by shared memory: 100 KiB in parts of 21 KiB
        ("sm_120", 32, 0, 1, 24),  # limited by the number of CTAs
        ("gfx942", 512, 0, 4, 1),  # a wave with 512 registers per SIMD
        ("gfx942", 128, 0, 4, 4),
        ("gfx942", 64, 33 << 10, 4, 1),
    ],
)
def test_occupancy(architecture, registers, shared, warps, blocks):
    assert ARCHITECTURES[architecture].resident_ctas(registers, shared, warps) == blocks


def test_a_result_is_kept_until_the_kernel_changes(tmp_path, monkeypatch):
    case = next(case for case in CASES if case.name == "pooling-bfloat16")
    recorded = ahead_of_time.record(case.call, "sm_90")[0]
    built = ahead_of_time.build(recorded, "sm_90", tmp_path)
    assert 0 < built.registers <= 255 and built.warps == 4 and not built.matrix

    def refuse(*args, **options):
        raise AssertionError("compiled again")

    monkeypatch.setattr(triton, "compile", refuse)
    assert ahead_of_time.build(recorded, "sm_90", tmp_path) == built
    for changed, architecture in (
        (recorded, "sm_80"),
        (recorded._replace(options={"num_warps": 8}), "sm_90"),
        (recorded._replace(arguments={**recorded.arguments, "D": 512}), "sm_90"),
    ):
        with pytest.raises(AssertionError, match="compiled again"):
            ahead_of_time.build(changed, architecture, tmp_path)
    # Another source that computes the same, then one that doesn't.
    monkeypatch.setattr(type(recorded.kernel), "cache_key", "another source")
    assert ahead_of_time.build(recorded, "sm_90", tmp_path) == built
    monkeypatch.setattr(type(recorded.kernel), "cache_key", "a third one")
    monkeypatch.setattr(ahead_of_time, "ttir", lambda *launch: "something else")
    with pytest.raises(AssertionError, match="compiled again"):
        ahead_of_time.build(recorded, "sm_90", tmp_path)


def test_other_backends_join_the_page_by_a_call():
    row = Row("some", "D 64", "bfloat16", "sm_80", 255, 0, 4096, 4, "8 HMMA", "64 x 32")
    rows = [row, dataclasses.replace(row, architecture="sm_90", spilled=7), dataclasses.replace(row, dtype="float32")]
    text = resources.page({"Triton": resources.tables([row]), "C++": resources.tables(rows)})
    assert text.count("## C++") == 1 and text.count("### some") == 2
    cell = "255 / 0 / 4096 / 2 x 4 / 8 HMMA / 64 x 32"
    assert f"| D 64 | bfloat16 | {cell} |\n" in text
    assert f"| D 64 | bfloat16 | {cell} | {cell.replace(' 0 ', ' **7** ')} |\n| D 64 | float32 | {cell} | - |\n" in text
    assert "For times, see [GPU results]" in text
    wide = dataclasses.replace(row, shape="D 256", spilled=3, warps=8)
    assert resources.summary([*rows, wide, dataclasses.replace(wide, spilled=0)]).splitlines()[2:] == [
        "| 16 bits | 1 / 0 / 8 | 1 / 1 / 8 |",
        "| 16 bits, D 256 | 2 / 1 / 8 | - |",
        "| float32 | 1 / 0 / 8 | - |",
    ]


def test_products_are_counted_by_precision():
    ttir = "tt.dot %a, %b, %c, inputPrecision = tf32x3 : t\ntt.dot %a, %b, %c : t\ntt.dot %a, inputPrecision = tf32"
    assert ahead_of_time._products(ttir) == {"tf32x3": 1, "ieee": 1, "tf32": 1}


@pytest.mark.skipif(not ALL, reason="compiles everything: make test-gpu-proof")
def test_the_page_is_up_to_date():
    assert resources.triton_tables().strip() in resources.PAGE.read_text()
