"""The table of architectures and its consumers."""

import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

from refrag_kernels import architectures

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((7, 5), "sm_80"), ((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 7), "sm_86"), ((8, 9), "sm_86"),
        ((9, 0), "sm_90"), ((10, 0), "sm_100"), ((10, 3), "sm_100"),
        ((11, 0), "sm_120"), ((12, 0), "sm_120"), ((12, 1), "sm_120"),
    ],
)  # fmt: skip
def test_a_device_has_the_configurations_of_the_nearest_older_architecture(capability, name):
    assert architectures.of_capability(*capability) == name


def test_the_table_is_read_without_torch():
    program = f"import runpy, sys; print(runpy.run_path({str(architectures.__file__)!r})['release_archs']())"
    program += "; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "80,86,89,90,100,120+PTX\n"


def test_the_hub_kernel_is_compiled_for_the_same_architectures():
    capabilities = [architectures.ARCHITECTURES[name].capability for name in architectures.CUDA]
    kernel = tomllib.loads((ROOT / "build.toml").read_text())["kernel"]["refrag_cuda"]
    assert kernel["cuda-capabilities"] == ["{}.{}".format(*capability) for capability in capabilities]


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_limits_agree_with_each_other(name):
    limits = architectures.ARCHITECTURES[name]
    assert limits.shared_memory_per_cta + limits.reserved_per_cta == limits.shared_memory_per_sm
    assert limits.resident_ctas(1, 0, 1) <= limits.ctas_per_sm
    assert limits.resident_ctas(32, limits.shared_memory_per_cta, 4) == 1
