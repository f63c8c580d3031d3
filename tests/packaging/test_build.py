"""The build: setup.py's compile commands, the compiled libraries, and the contents of a wheel."""

import contextlib
import fcntl
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from refrag_kernels import extension

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setup_py():
    spec = importlib.util.spec_from_file_location("refrag_kernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def sources(setup_py, tmp_path, monkeypatch):
    """A tree with one source of each kind."""
    for name in ("ops.cpp", "cpu/isa.cpp", "cpu/kernels/attention.cpp", "cuda/pooling.cu", "planner/module.cpp"):
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(setup_py, "ROOT", tmp_path)


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A CUDA toolkit whose nvcc is found through a wrapper script in another folder."""
    home = tmp_path / "cuda-1.0"
    (home / "lib64").mkdir(parents=True)
    (home / "lib64" / "libcudart_static.a").touch()
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.write_text(f"#!/bin/sh\necho '#$ _HERE_={home}/bin' >&2\necho '#$ TOP={home}/bin/..' >&2\n")
    wrapper.chmod(0o755)
    (home / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name in ("CUDA_HOME", "REFRAG_KERNELS_CUDA", "REFRAG_KERNELS_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    return home


def test_cuda_is_left_out_when_told_so(setup_py, sources, toolkit, monkeypatch):
    monkeypatch.setenv("REFRAG_KERNELS_CUDA", "0")
    assert setup_py.Cuda.find() is None
    text = str(setup_py.NinjaFile(Path("build/x"), setup_py.Cuda.find()))
    assert "csrc/ops.cpp" in text
    for word in ("nvcc", "pooling.cu", "cudart", "REFRAG_CUDA_ARCHS"):
        assert word not in text


def test_cuda_is_found_behind_a_wrapper_script(setup_py, sources, toolkit):
    cuda = setup_py.Cuda.find()
    assert cuda.cudart == toolkit / "lib64" / "libcudart_static.a"
    text = str(setup_py.NinjaFile(Path("build/x"), cuda))
    assert "build build/x/csrc/cuda/pooling.cu.o: nvcc csrc/cuda/pooling.cu" in text
    assert "arch=compute_80,code=sm_80" in text and "arch=compute_90,code=[sm_90,compute_90]" in text
    assert str(cuda.cudart) in text


def test_without_nvcc_the_build_goes_on_and_says_so(setup_py, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("REFRAG_KERNELS_CUDA", raising=False)
    assert setup_py.Cuda.find() is None
    assert "without CUDA kernels: nvcc was not found" in capsys.readouterr().out
    monkeypatch.setenv("REFRAG_KERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match="nvcc was not found"):
        setup_py.Cuda.find()


def test_a_release_has_every_architecture_and_the_ptx_of_the_newest(setup_py, toolkit, monkeypatch):
    monkeypatch.setenv("REFRAG_KERNELS_CUDA_ARCHS", "release")
    codes = [flag.rpartition("=")[2] for flag in setup_py.Cuda.find().flags()[1::2]]
    assert codes == ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "[sm_120,compute_120]"]


def test_architectures_that_make_no_sense_are_refused(setup_py):
    with pytest.raises(SystemExit, match="REFRAG_KERNELS_CUDA_ARCHS: got '9.0'"):
        setup_py.Cuda("nvcc", Path("libcudart_static.a"), "80,9.0").flags()


def test_each_kernel_is_compiled_for_each_instruction_set(setup_py, sources):
    lines = str(setup_py.NinjaFile(Path("build/x"), None)).splitlines()
    for isa, options in setup_py.ISAS.items():
        index = lines.index(f"build build/x/csrc/cpu/kernels/attention.cpp.{isa}.o: cxx csrc/cpu/kernels/attention.cpp")
        assert f"-DREFRAG_ISA={isa}" in lines[index + 1] and options in lines[index + 1]
        assert "-isystem" not in lines[index + 1]  # only our own and the compiler's headers
    other = next(i for i, line in enumerate(lines) if line.endswith("cxx csrc/cpu/isa.cpp"))
    assert "-mavx" not in lines[other + 1]


def test_sanitizers_reach_compiler_and_linker(setup_py, sources):
    lines = str(setup_py.NinjaFile(Path("build/x"), None, "address,undefined")).splitlines()
    flags = [line for line in lines if line.startswith(("  flags", "  command = c++ -shared"))]
    assert flags and all("-fsanitize=address,undefined" in line for line in flags)


@pytest.mark.parametrize(
    ("torch_version", "triton"),
    [
        ("2.11.0+cu130", "triton==3.6.0"),
        ("2.13.0+cpu", "triton==3.7.1"),
        ("2.14.1+cu130", "triton~=3.8.0"),
        ("2.99.0", "triton"),
    ],
)
def test_triton_is_the_one_that_goes_with_torch(setup_py, monkeypatch, torch_version, triton):
    monkeypatch.setattr(setup_py.importlib.metadata, "version", lambda name: torch_version)
    target = "2.11" if torch_version.startswith("2.11") else "2.13"
    assert setup_py.requirements() == [f"torch>={target}", f'{triton}; platform_system == "Linux"']


def test_the_stable_abi_is_that_of_the_build_and_no_newer_than_what_is_used(setup_py, sources, monkeypatch):
    for version, target in (("2.11.0", "0x020b"), ("2.13.0+cpu", "0x020d"), ("2.14.1", "0x020d"), ("3.0.0", "0x020d")):
        monkeypatch.setattr(setup_py.importlib.metadata, "version", lambda name, version=version: version)
        assert f"-DTORCH_TARGET_VERSION={target}000000000000ULL" in str(setup_py.NinjaFile(Path("build/x"), None))
    monkeypatch.setattr(setup_py.importlib.metadata, "version", lambda name: "2.10.1")
    with pytest.raises(SystemExit, match="torch: got 2.10, building refrag-kernels needs 2.11 or newer"):
        setup_py.target_torch()


def library() -> Path:
    return Path(extension.__file__).parent / "_C.so"


def test_the_kernels_hold_no_python_symbols_and_need_no_cuda_runtime():
    symbols = subprocess.run(["nm", "-D", library()], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"\b_?Py[A-Z]", symbols)
    assert "torch_library_impl" in symbols
    dynamic = subprocess.run(["readelf", "-d", library()], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu.so" in dynamic
    for word in ("cuda", "c10", "libpython", "libtorch_python", "RPATH", "RUNPATH"):
        assert word not in dynamic


def test_the_kernels_take_nothing_from_torch_but_its_stable_abi():
    command = ["nm", "-D", "--undefined-only", "--with-symbol-versions", library()]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    # Symbols of the C and C++ libraries have versions; weak ones (w) are hooks of the loader.
    of_torch = [line.split()[1] for line in symbols if re.match(r"\s+U [^@]+$", line)]
    assert of_torch and [name for name in of_torch if not name.startswith(("aoti_torch_", "torch_"))] == []


def test_nothing_compiled_for_an_instruction_set_can_replace_common_code():
    # The linker keeps one copy of an inline function; an AVX-512 copy would crash on other machines.
    objects = sorted((ROOT / "build" / sys.implementation.cache_tag / "csrc" / "cpu" / "kernels").glob("*.o"))
    assert objects
    for path in objects:
        isa = path.name.split(".")[-2]
        listing = subprocess.run(["nm", "-C", "--defined-only", "--extern-only", path], capture_output=True, text=True)
        for line in listing.stdout.splitlines():
            assert f"refrag::cpu::{isa}::" in line, f"{path.name}: {line}"


def test_cuda_kernels_are_there_when_nvcc_is(setup_py):
    assert extension.load_error() is None
    cuda = setup_py.Cuda.find()
    assert torch.ops.refrag_cuda.architectures() == (cuda.archs if cuda else "")
    registered = torch._C._dispatch_has_kernel_for_dispatch_key("refrag_cuda::pool_chunks", "CUDA")
    assert registered == (cuda is not None)


@contextlib.contextmanager
def alone_in_the_checkout():
    """Keep test processes from building in the checkout concurrently, since they write the same files."""
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / "tests.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", folder, ROOT]
    with alone_in_the_checkout():
        subprocess.run(command, check=True)
    (path,) = folder.glob("refrag_kernels-*.whl")
    return path


def test_wheel_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        compiled = [archive.read(name) for name in names if name.endswith(".so")]
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    assert {name.split("/")[0] for name in names} <= {"refrag_kernels", "refrag", "refrag_kernels-0.1.0.dist-info"}
    for name in ("refrag_kernels/_C.so", "refrag_kernels/py.typed", "refrag_kernels/reference/attention.py"):
        assert name in names
    assert any(re.fullmatch(r"refrag_kernels/_planner\..*\.so", name) for name in names)
    assert any(name.endswith("/LICENSE") for name in names)
    folders = (ROOT, Path(torch.__file__).parent, Path.home())
    assert len(compiled) == 2 and not [f for f in folders for data in compiled if f"{f}/".encode() in data]
    assert re.search(r"Requires-Dist: torch>=2\.1[123]\n", metadata)
    assert re.search(r'Requires-Dist: triton[=~]=3\.[0-9.]+; platform_system == "Linux"\n', metadata)
    assert "License-Expression: Apache-2.0" in metadata
    extras = set(re.findall(r"Provides-Extra: (\w+)", metadata))
    assert {"model", "train", "bench", "test"} <= extras


def test_source_distribution_contents(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "-d", tmp_path]
    with alone_in_the_checkout():
        subprocess.run(command, check=True, cwd=ROOT)
    (path,) = tmp_path.glob("refrag_kernels-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("bench", "csrc", "python", "refrag_kernels", "tests"):
        sources = (file for file in (ROOT / folder).rglob("*") if file.suffix in (".py", ".h", ".cpp", ".cu"))
        assert {str(file.relative_to(ROOT)) for file in sources} <= names
    assert {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "Makefile", "pyproject.toml"} <= names
    assert not [name for name in names if name.startswith(("build/", ".")) or name.endswith((".so", ".pyc"))]


def test_wheel_runs_without_a_compiler(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = """
import refrag_kernels as rk
print(rk.__file__)
print(rk.plan_attention(rk.ChunkLayout.from_lengths([[4, 1, 2]])).stats()["pairs_allowed"])
print(rk.backends.report())
"""
    environment = {"PYTHONPATH": str(tmp_path), "PATH": str(tmp_path / "empty")}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    path, pairs, *report = result.stdout.splitlines()
    assert Path(path).parent.parent == tmp_path
    assert int(pairs) == 28
    assert any(re.match(r"\s+_C\s+loaded", line) for line in report)
