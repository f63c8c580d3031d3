"""Shared set-up: uninitialised memory is NaN, so that an output nobody wrote shows."""

import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def no_turns_with_other_processes(tmp_path_factory):
    # Benchmarks take turns on a machine (refrag.training.pause); those of the tests needn't.
    os.environ["REFRAG_PAUSE_LOCK"] = str(tmp_path_factory.mktemp("pause") / "lock")


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    # In deterministic mode torch fills what torch.empty and its C++ forms return with NaN or the largest integer.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
