"""Resources of the built CUDA kernels, read from their machine code: no spills, the intended occupancy, 16-byte
accesses and matrix instructions. No GPU is needed."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from refrag_kernels import extension
from refrag_kernels.architectures import ARCHITECTURES, CUDA

resources = pytest.importorskip(
    "bench.static.cuda_resources", reason="Triton carries the disassembler", exc_type=ImportError
)

ROOT = Path(__file__).resolve().parents[2]
ALL = os.environ.get("REFRAG_GPU_PROOF") == "all"  # make test-gpu-proof: all architectures of a release
HAS_NVCC = bool(shutil.which("nvcc") or os.environ.get("CUDA_HOME")) and os.environ.get("REFRAG_KERNELS_CUDA") != "0"


@pytest.fixture(scope="module")
def binaries():
    return resources.compile_release() if ALL else [resources.LIBRARY]


@pytest.fixture(scope="module")
def kernels(binaries):
    assert extension.load_error() is None
    found = resources.read(binaries)
    if not found and not HAS_NVCC:
        pytest.skip("built without CUDA kernels: nvcc was not found")
    assert found, f"nvcc is installed, but {binaries} have no CUDA kernels: rebuild"
    return found


def test_every_architecture_has_every_kernel(kernels):
    built = {f"sm_{number}" for number in re.findall(r"\d+", torch.ops.refrag_cuda.architectures())}
    assert {kernel.architecture for kernel in kernels} == (set(CUDA) if ALL else built)
    symbols = {kernel.symbol for kernel in kernels}
    assert len(kernels) == len(symbols) * len({kernel.architecture for kernel in kernels})
    assert {(k.name, *k.numbers) for k in kernels if k.configuration.shared} == set(resources.CONFIGURATIONS)


def test_no_kernel_spills(kernels):
    assert [kernel for kernel in kernels if kernel.stack] == []


def test_occupancy_is_as_intended(kernels):
    assert [k for k in kernels if k.chosen and k.occupancy < k.configuration.blocks] == []
    # Kernels use only dynamic shared memory, see csrc/cuda/device.cuh.
    assert all(kernel.static_shared == 0 for kernel in kernels)


def test_the_table(kernels, binaries):
    lines = resources.markdown(binaries).splitlines()
    names = {(k.name, k.types, k.numbers) for k in kernels}
    assert len(lines) == len(names) + 2
    assert "".join(lines[2:]).count(" / ") == 2 * sum(kernel.chosen for kernel in kernels)


@pytest.mark.skipif(not ALL, reason="compiles for every architecture of a release: make test-gpu-proof")
def test_the_page_is_up_to_date(binaries):
    page = (ROOT / "docs" / "gpu-resources.md").read_text()
    if f"CUDA C++, {resources.compiler()}\n" not in page:
        pytest.skip(f"written with another compiler than {resources.compiler()}")
    assert resources.markdown(binaries).strip() in page, "run python -m bench.resources --release"


def accesses(counts, instruction: str, size: int) -> int:
    """Count the loads or stores of ``size`` bytes per thread."""
    return sum(n for name, n in counts.items() if re.match(rf"{instruction}\.E\.(\w+\.)*{8 * size}\b", name))


def test_machine_code(kernels, binaries):
    """Copies to shared memory use 16-byte cp.async, loads and stores through registers are 16 bytes, matrix products
    use tensor cores, and nothing uses local memory."""
    for architecture in {kernel.architecture for kernel in kernels}:
        instructions = resources.instructions(architecture, binaries)
        for kernel in (kernel for kernel in kernels if kernel.architecture == architecture):
            counts = instructions[kernel.symbol]
            assert counts["EXIT"], kernel  # the listing was read
            assert not [name for name in counts if re.match(r"(LDL|STL)\b", name)], kernel
            asynchronous = [name for name in counts if name.startswith("LDGSTS")]
            matrix = [name for name in counts if name.startswith("HMMA.16816.F32")]
            if kernel.name in ("mixed_attention_kernel", "paged_attention_kernel"):
                assert asynchronous and all(".128" in name for name in asynchronous), kernel
                assert any(name.startswith("LDSM.16.M88.4") for name in counts), kernel
                assert any(name.startswith("LDSM.16.MT88.4") for name in counts), kernel
                assert matrix, kernel
            elif kernel.name == "small_m_projection_kernel":
                assert matrix and accesses(counts, "LDG", 16), kernel
            else:
                wide = kernel.numbers != (1,) and not {"2 bytes", "4 bytes"} & set(kernel.types)
                assert (accesses(counts, "LDG", 16) > 0) == wide, kernel
                if kernel.name != "merge_splits_kernel":  # each thread's four sums become 16-bit elements
                    assert (accesses(counts, "STG", 16) > 0) == wide, kernel


def test_sizes_and_choices_are_those_of_the_headers(tmp_path):
    """The table of configurations equals what the headers compute."""
    source = tmp_path / "sizes.cpp"
    sizes = {
        "mixed_attention_kernel": "AttentionShared<{}>::kBytes",
        "paged_attention_kernel": "PagedShared<{}>::kBytes",
        "small_m_projection_kernel": "small_m_shared_bytes<{}>()",
    }
    choices = {"mixed_attention_kernel": "attention_tiles", "paged_attention_kernel": "paged_warps"}
    lines = []
    for (name, *numbers), configuration in resources.CONFIGURATIONS.items():
        lines.append(f"static_assert({sizes[name].format(', '.join(map(str, numbers)))} == {configuration.shared});")
        for architecture in configuration.architectures if name in choices else ():
            width, choice = numbers
            limits = ARCHITECTURES[architecture]
            memory = f"{{{limits.shared_memory_per_sm}, {limits.reserved_per_cta}}}"
            lines.append(f"static_assert({choices[name]}<{width}>({memory}) == {choice});")
    headers = "".join(f'#include "cuda/{name}_kernels.cuh"\n' for name in ("attention", "paged", "projection"))
    source.write_text(headers + "using namespace refrag::cuda;\n" + "\n".join(lines))
    command = "c++ -std=c++20 -fsyntax-only -Wno-unknown-pragmas -DREFRAG_CUDA_HOST".split()
    done = subprocess.run(
        [*command, f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'cuda_host'}", str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
