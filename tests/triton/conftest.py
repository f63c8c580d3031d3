"""Run Triton's kernels on the CPU; see tests/support/triton_on_cpu.py.

Files named test_interpreted_* need the interpreter or ttsem, all others the compiler; a process collects one kind.
``tests/triton/test_interpreter.py`` and ``test_second_opinion.py`` start the former from the latter. Manually:
``TRITON_INTERPRET=1 pytest tests/triton``. REFRAG_GPU_PROOF=all (``make test-gpu-proof``) tests more cases.
"""

import pytest

from tests.support import triton_on_cpu

RUNS_KERNELS = triton_on_cpu.INTERPRETED or triton_on_cpu.TTSEM
collect_ignore_glob = ["test_[!i]*.py", "test_interpreter.py"] if RUNS_KERNELS else ["test_interpreted_*.py"]


@pytest.fixture(autouse=True)
def triton_on_the_cpu(monkeypatch):
    """Give the CPU plans with tile lists and, if kernels run, the backend itself."""
    if RUNS_KERNELS:
        triton_on_cpu.install(monkeypatch)
    else:
        triton_on_cpu.plans_have_tile_lists(monkeypatch)
