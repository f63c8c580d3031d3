"""Shared set-up: uninitialised memory is NaN, so that an output nobody wrote shows."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    # In deterministic mode torch fills what torch.empty and its C++ forms return with NaN or the largest integer.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
