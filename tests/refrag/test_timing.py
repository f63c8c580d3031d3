"""The demo's measuring tools."""

from pathlib import Path

import pytest
from refrag.demo.timing import CpuPressure


@pytest.mark.skipif(not Path("/proc/pressure/cpu").exists(), reason="this system has no pressure stall information")
def test_cpu_pressure_is_a_share():
    assert 0 <= CpuPressure().share() < 1.5  # the two clocks are not read at the same time


def test_cpu_pressure_is_unknown_elsewhere(monkeypatch):
    monkeypatch.setattr("refrag.demo.timing._stalled", lambda: None)
    assert CpuPressure().share() is None
