"""Run the compiled Triton kernels on the CPU with ttsem, which checks values, bounds and races between programs.

ttsem 0.1.0 requires Python 3.12 and has no release for this Triton, but it works if installed with
``pip install --no-deps --ignore-requires-python ttsem==0.1.0``, as in ``make test-gpu-proof``. An extra can't express
this.
"""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.triton.modes import ALL

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ttsem") is None, reason="ttsem is not installed"),
    pytest.mark.skipif(not ALL, reason="takes minutes: make test-gpu-proof"),
]


def sanitize(*arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    command = [sys.executable, "-m", "ttsem.sanitize", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)


# Files of the interpreter's and the GPU's tests, and the number of processes for each.
FILES = {
    "tests/triton/test_interpreted_attention.py": 6,
    "tests/triton/test_interpreted_bounds.py": 1,
    "tests/triton/test_interpreted_decode.py": 1,
    "tests/triton/test_interpreted_order.py": 1,
    "tests/triton/test_interpreted_paged.py": 2,
    "tests/triton/test_interpreted_received.py": 1,
    "tests/triton/test_interpreted_rows.py": 2,
    "tests/gpu/test_gpu_ops.py": 8,
}
# Tests that ttsem can't run, and the reasons.
LEFT_OUT = {
    "test_interpreted_chunk_rows.py": "computes offsets on the CPU, and all tensors stand for a GPU's",
    "test_interpreted_replay.py": "records the launches of the interpreter",
    "test_interpreted_work.py": "counts what the interpreter loads and stores",
    "test_opcheck": "fake tensors don't take the tensors that stand for a GPU's",
    "test_keys_far_into_a_tensor": "a tensor of gigabytes, of which it keeps a copy",
    "test_pages_with_keys_far_apart": "the same",
    "test_rows_are_appended_far_apart": "the same",
    "test_states_with_heads_far_apart": "the same",
    "test_a_product_over_rows_far_apart": "the same",
    "test_values_are_checked_where_that_is_asked_for": "asks torch's CUDA part, which is not there, about graphs",
}


def test_every_file_is_run_or_left_out():
    sources = {path.name: path.read_text() for path in (ROOT / "tests" / "triton").glob("test_interpreted_*.py")}
    assert set(sources) == {pathlib.Path(f).name for f in FILES if "gpu" not in f} | set(LEFT_OUT) & set(sources)
    tests = set(re.findall(r"^def (test_\w+)", "".join(sources.values()), re.M))
    assert {name for name in LEFT_OUT if not name.endswith(".py")} <= tests


@pytest.mark.parametrize(("file", "shard"), [(f, f"{n}/{count}") for f, count in FILES.items() for n in range(count)])
def test_the_tests_of_the_interpreter_and_of_a_gpu(file, shard):
    """Values equal float64, forward and backward, and memory accesses are in bounds and free of races."""
    wanted = " and ".join([*(["triton"] if "gpu" in file else []), *(f"not {name}" for name in LEFT_OUT)])
    plugins = ("-p", "no:cacheprovider", "-p", "bench.gpu_report.pytest_record")
    options = ("-q", *plugins, "--shard", shard, "--show-capture=no")
    done = sanitize("pytest", file, *options, "-k", wanted)
    passed = re.search(r"\b(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed, done.stdout[-8000:] + done.stderr[-2000:]
    assert int(passed.group(1)) >= 6, done.stdout


COPY = """
import sys
import torch
import triton
import triton.language as tl


@triton.jit
def copy_kernel(source, target, DISTANCE: tl.constexpr):
    o_row = tl.program_id(0) * DISTANCE + tl.arange(0, 16)
    tl.store(target + o_row, tl.load(source + o_row) + tl.program_id(0))


source, target = torch.arange(32, device="cuda"), torch.empty(32, dtype=torch.int64, device="cuda")
copy_kernel[(2,)](source, target, int(sys.argv[1]))
assert target.tolist() == [*range(16), *range(17, 33)]
"""


@pytest.mark.parametrize(("distance", "fault"), [(16, None), (17, "oob_read: 1"), (15, "race: 1")])
def test_planted_faults(distance, fault, tmp_path):
    """ttsem itself: out-of-bounds reads and racing writes stop with an error at the kernel's line."""
    program = tmp_path / "copy.py"
    program.write_text(COPY)
    done = sanitize(program, "--", distance)
    said = done.stdout + done.stderr
    if fault is None:
        assert done.returncode == 0, said
    else:
        assert done.returncode != 0 and fault in said and "tl.program_id(0)" in said, said
