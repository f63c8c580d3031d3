"""What Triton's compiler makes of the kernels, run on the CPU by ttsem: values, bounds, races between programs.

ttsem 0.1.0 asks for Python 3.12 and has no release for this Triton; it works nonetheless, installed by
``pip install --no-deps --ignore-requires-python ttsem``, as ``make test-gpu-proof`` does. No extra can ask for it so.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
from modes import ALL

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.skipif(importlib.util.find_spec("ttsem") is None, reason="ttsem is not installed")
@pytest.mark.skipif(not ALL, reason="takes a minute: make test-gpu-proof")
def test_a_call_of_each_op_under_ttsem():
    test = "tests/gpu/test_gpu_sample.py"
    command = [sys.executable, "-m", "ttsem.sanitize", "pytest", test, "-q", "-p", "no:cacheprovider", "-k", "triton"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0 and "8 passed" in done.stdout, done.stdout[-8000:] + done.stderr[-2000:]
