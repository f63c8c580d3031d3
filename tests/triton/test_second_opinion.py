"""What Triton's compiler makes of the kernels, run on the CPU by ttsem: values, bounds, races between programs.

ttsem 0.1.0 asks for Python 3.12 and has no release for this Triton; it works nonetheless, installed by
``pip install --no-deps --ignore-requires-python ttsem==0.1.0``, as ``make test-gpu-proof`` does. No extra can ask for
it so.
"""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest
from modes import ALL

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


@pytest.mark.parametrize("number", [1, 3, 5])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_calls_of_each_op(dtype, number):
    """The tests for a GPU, gradients among them, against float64."""
    selected = f"test_against_float64 and triton and {dtype} and -{number}]"
    done = sanitize("pytest", "tests/gpu/test_gpu_ops.py", "-q", "-p", "no:cacheprovider", "-k", selected)
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
    """ttsem itself: programs that read beyond a tensor, or write to the same place, end at the kernel's line."""
    program = tmp_path / "copy.py"
    program.write_text(COPY)
    done = sanitize(program, "--", distance)
    said = done.stdout + done.stderr
    if fault is None:
        assert done.returncode == 0, said
    else:
        assert done.returncode != 0 and fault in said and "tl.program_id(0)" in said, said
