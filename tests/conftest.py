"""Shared setup: uninitialized memory is NaN, so that unwritten outputs are detected."""

from pathlib import Path

import pytest
import torch

import refrag_kernels

_MARKS_OF_ROOMS = {"kernels": "cpp", "cuda_host": "gpu_proof", "triton": "gpu_proof"}


def pytest_addoption(parser):
    parser.addoption("--build", type=Path, help="folder that refrag_kernels must come from")


def pytest_configure(config):
    """Refuse to test another copy of the package than the one that was built for it, as in make test-asan."""
    build = config.getoption("--build")
    package = Path(refrag_kernels.__file__).parent
    if build is not None and package.parent != build.resolve():
        pytest.exit(f"refrag_kernels: got {package}, needs that of --build={build}", returncode=3)


def pytest_collection_modifyitems(items):
    """Mark the tests of each folder; modules and tests add their own marks if they differ."""
    for item in items:
        mark = _MARKS_OF_ROOMS.get(item.path.parent.name)
        if mark:
            item.add_marker(mark)


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    # In deterministic mode, torch fills the result of torch.empty (also in C++) with NaN or the largest integer.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
