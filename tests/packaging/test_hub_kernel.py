"""build.toml and torch-ext/: the CUDA ops as Hugging Face's kernel builder builds them.

The builder itself needs nix. build.toml follows edition 5; these tests repeat the builder's steps: they compile the
files with TORCH_EXTENSION_NAME and add ``_ops.py`` to torch-ext's Python.
"""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import refrag_kernels as rk
from tests.cuda_host import host_library
from tests.support.accuracy import OUTPUT, relative_error
from tests.support.paged_problems import make_problem

pytestmark = pytest.mark.gpu_proof
ROOT = Path(__file__).parents[2]
tomllib = pytest.importorskip("tomllib", reason="tomllib needs Python 3.11")
BUILD = tomllib.loads((ROOT / "build.toml").read_text())
ALL = os.environ.get("REFRAG_GPU_PROOF") == "all"
FAMILIES = ("paged", "pooling", "projection")

# Written by the builder: the macros that torch_binding.cpp uses.
REGISTRATION = """
#include <Python.h>
#define STABLE_TORCH_LIBRARY_EXPAND(name, m) STABLE_TORCH_LIBRARY(name, m)
#define MODULE_INIT(name) PyInit_##name
#define MODULE_NAME(name) #name
#define DEFINE_MODULE(name) \\
  extern "C" __attribute__((visibility("default"))) PyObject* MODULE_INIT(name)() { \\
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, MODULE_NAME(name), nullptr, 0, nullptr}; \\
    return PyModule_Create(&module); \\
  }
#define REGISTER_EXTENSION(name) DEFINE_MODULE(name)
"""
OPS = """
import torch
ops = torch.ops.{name}


def add_op_namespace_prefix(op_name):
    return f"{name}::{{op_name}}"
"""


def test_the_file_has_the_format_of_the_builder():
    assert set(BUILD) == {"general", "torch", "kernel"}  # the builder rejects unknown fields
    general = BUILD["general"]
    assert set(general) == {"name", "version", "edition", "license", "backends"}
    assert general["edition"] == 5 and general["backends"] == ["cuda"] == list(BUILD["torch"]["stable-abi"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert general["license"] == project["license"]
    package = general["name"].replace("-", "_")
    assert package != "refrag_kernels" and (ROOT / "torch-ext" / package / "__init__.py").is_file()
    assert set(BUILD["torch"]) == {"src", "include", "stable-abi"}
    (kernel,) = BUILD["kernel"].values()
    assert set(kernel) == {"backend", "depends", "cuda-capabilities", "include", "src"}
    assert kernel["backend"] == "cuda" and kernel["depends"] == ["torch"]
    # The builder uses C++20 from torch 2.12 on.
    assert tuple(map(int, BUILD["torch"]["stable-abi"]["cuda"].split("."))) >= (2, 12)


def test_the_file_lists_what_its_sources_include():
    listed = {*BUILD["torch"]["src"], *BUILD["kernel"]["refrag_cuda"]["src"]}
    assert all((ROOT / name).is_file() for name in listed)
    included = set()
    for name in listed:
        for header in re.findall(r'#include "([\w/.]+)"', (ROOT / name).read_text()):
            if header not in ("registration.h", "cuda_host.h"):  # provided by the builder and the tests
                included.add(f"csrc/{header}")
    assert included <= listed and {name for name in listed if name.endswith((".h", ".cuh"))} <= included
    launchers = {f"csrc/cuda/{family}.cu" for family in FAMILIES}
    assert {name for name in listed if name.endswith(".cu")} == launchers


def test_the_package_is_what_the_library_makes_of_it():
    spec = importlib.util.spec_from_file_location("hub_generate", ROOT / "torch-ext" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    text = (ROOT / "torch-ext" / "refrag_ops" / "__init__.py").read_text()
    assert text == generate.source(), "run PYTHONPATH=. python torch-ext/generate.py"


def load(folder, name):
    """Import torch-ext's package from ``folder``, with an ``_ops.py`` for the ops of namespace ``name``."""
    package = folder / "refrag_ops"
    shutil.copytree(ROOT / "torch-ext" / "refrag_ops", package)
    (package / "_ops.py").write_text(OPS.format(name=name))
    spec = importlib.util.spec_from_file_location(
        f"hub_{name}", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The package on the CPU, whose launchers run their kernels on the host, and the library of one of them."""
    folder, name = tmp_path_factory.mktemp("hub"), "refrag_kernels_host"
    (folder / "registration.h").write_text(REGISTRATION)
    define = f"-DTORCH_EXTENSION_NAME={name}"
    python = f"-I{sysconfig.get_path('include')}"
    binding = host_library.compile_torch_library(
        ROOT / "torch-ext" / "torch_binding.cpp", define, f"-I{folder}", f"-I{ROOT / 'csrc'}", python
    )
    torch.ops.load_library(str(binding))
    for family in FAMILIES if ALL else ("pooling",):
        launcher = f'-DLAUNCHER="cuda/{family}.cu"'
        source = host_library.HERE / "launchers.cpp"
        library = str(host_library.compile_torch_library(source, define, launcher))
        torch.ops.load_library(library)
    return load(folder, name), ctypes.CDLL(library)


@pytest.fixture
def hub(built):
    """The package, with the fake runtime reset: other tests of the process share it and make its calls fail."""
    package, library = built
    library.fail_at(b"")
    return package


def test_it_exports_its_ops_and_imports_torch_alone(hub):
    assert all(callable(getattr(hub, name)) for name in hub.__all__)
    text = (ROOT / "torch-ext" / "refrag_ops" / "__init__.py").read_text()
    modules = set(re.findall(r"^(?:from|import) ([\w.]+)", text, re.M))
    assert modules == {"__future__", "torch", "torch.nn.functional", "._ops"}


@pytest.mark.parametrize("name, value, message", [("softcap", -1.0, "got -1.0, needs"), ("window", 0, "got 0, needs")])
def test_settings_that_make_no_sense_are_refused(hub, name, value, message):
    q, pages = torch.zeros(1, 2, 64), torch.zeros(1, 16, 2, 64)
    page_table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        hub.paged_attention(q, pages, pages, page_table, lengths, **{name: value})


@pytest.mark.parametrize("mode", ["mean", "first", "last"])
def test_pooling(hub, mode):
    hidden, offsets = torch.randn(20, 64), torch.tensor([0, 1, 17, 20], dtype=torch.int32)
    expected = rk.pool_chunks(hidden.double(), offsets, mode, backend="reference")
    assert relative_error(hub.pool_chunks(hidden, offsets, mode), expected) <= OUTPUT[torch.float32]
    compiled = torch.compile(hub.pool_chunks, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, offsets, mode), hub.pool_chunks(hidden, offsets, mode))


@pytest.mark.skipif(not ALL, reason="compiles for a minute: make test-gpu-proof")
@pytest.mark.parametrize("chunks", [5, 70])
def test_projection_and_assembly(hub, chunks):
    torch.manual_seed(chunks)
    shapes = [(9, 40), (chunks, 24), (48, 24), (48,), (40, 48), (40,)]
    table, rows, *weights = ((torch.randn(shape) / 3).half() for shape in shapes)
    slots = torch.full((chunks + 4,), -1, dtype=torch.int32)
    slots[2 : 2 + chunks] = torch.arange(chunks, dtype=torch.int32)
    ids = torch.randint(0, 9, slots.shape)
    mixed = hub.embed_mixed(ids, table, rows, slots, *weights, activation="gelu_tanh", token_scale=2.0)
    expected = rk.embed_mixed(
        ids, table.double(), rows.double(), slots, *(w.double() for w in weights), activation="gelu_tanh",
        token_scale=2.0, backend="reference",
    )  # fmt: skip
    assert relative_error(mixed, expected) <= OUTPUT[torch.float16]
    with pytest.raises(ValueError, match="activation: got 'sine', needs one of gelu"):
        hub.project_chunks(rows, *weights, activation="sine")


@pytest.mark.skipif(not ALL, reason="compiles for a minute: make test-gpu-proof")
def test_paged_attention_and_merge(hub):
    problem = make_problem(3, [40, 17], rows=[3, 1], dim=64, page=16, dtype=torch.float16, visible=True)
    out, lse = hub.paged_attention(*problem.args, **problem.options, return_lse=True)
    assert relative_error(out, problem.out) <= OUTPUT[torch.float16]
    state, weight = torch.randn(3, 2, 64), torch.randn(3, 2)
    merged = hub.merge_states(state, weight, state.flip(0), weight.flip(0))
    expected = rk.merge_states(*(t.double() for t in (state, weight, state.flip(0), weight.flip(0))))
    assert all(relative_error(a, b) <= 5e-6 for a, b in zip(merged, expected))


@pytest.mark.skipif(not ALL, reason="nvcc compiles for minutes: make test-gpu-proof")
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found")
def test_what_nvcc_makes_of_it_is_one_module(tmp_path):
    """As in the builder's CMake: limited Python API, one namespace, the CUDA dispatch key."""
    name = "_refrag_kernels_cuda_by_hand"
    (tmp_path / "registration.h").write_text(REGISTRATION)
    root = Path(torch.__file__).parent
    minor = int(BUILD["torch"]["stable-abi"]["cuda"].split(".")[1])
    flags = [f"-I{ROOT / 'csrc'}", f"-I{tmp_path}", "-isystem", str(root / "include"), f"-DTORCH_EXTENSION_NAME={name}"]
    flags += [
        "-std=c++20",
        "-O2",
        "-DUSE_CUDA=1",
        "-DCUDA_KERNEL",
        f"-DTORCH_TARGET_VERSION=0x02{minor:02x}000000000000ULL",
    ]
    python = ["-I", sysconfig.get_path("include"), "-DPy_LIMITED_API=0x03090000"]
    capability = BUILD["kernel"]["refrag_cuda"]["cuda-capabilities"][0].replace(".", "")
    objects = [tmp_path / "binding.o", *(tmp_path / f"{family}.o" for family in FAMILIES)]
    binding = ROOT / "torch-ext" / "torch_binding.cpp"
    subprocess.run(["c++", "-fPIC", *flags, *python, "-c", str(binding), "-o", str(objects[0])], check=True)
    for family, built in zip(FAMILIES, objects[1:]):
        source = ROOT / "csrc" / "cuda" / f"{family}.cu"
        nvcc = ["nvcc", f"-arch=sm_{capability}", "-Xcompiler", "-fPIC", *flags, "-c", str(source), "-o", str(built)]
        subprocess.run(nvcc, check=True)
    module = tmp_path / f"{name}.abi3.so"
    libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-cudart", "static"]
    subprocess.run(["nvcc", "-shared", *map(str, objects), *libraries, "-o", str(module)], check=True)
    spec = importlib.util.spec_from_file_location(name, module)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for op in ("paged_attention", "append_kv", "merge_states", "pool_chunks", "project_chunks", "assemble_mixed"):
        assert has(f"{name}::{op}", "CUDA"), op
    hub = load(tmp_path, name)
    hidden = torch.empty(20, 64, device="meta")
    assert hub.pool_chunks(hidden, torch.empty(4, dtype=torch.int32, device="meta"), "mean").shape == (3, 64)
