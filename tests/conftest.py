"""Shared set-up: uninitialised memory is NaN, so that an output nobody wrote shows."""

import pytest
import torch

_MARKS_OF_ROOMS = {"kernels": "cpp", "cuda_host": "gpu_proof", "triton": "gpu_proof"}


def pytest_collection_modifyitems(items):
    """Mark the tests of a room; modules and tests mark themselves where they differ."""
    for item in items:
        mark = _MARKS_OF_ROOMS.get(item.path.parent.name)
        if mark:
            item.add_marker(mark)


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    # In deterministic mode torch fills what torch.empty and its C++ forms return with NaN or the largest integer.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
