"""Compile the Triton backend's launches for architectures that are not present, and read the kernels' resources.

A call of an op is recorded instead of run; its launches, with their real arguments, are then compiled for an
architecture. The result is cached under a hash of the kernel's source and compile options, and under a hash of its
TTIR, so that a change of comments or names causes no recompilation.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from refrag_kernels import tile_lists
from refrag_kernels.architectures import ARCHITECTURES
from refrag_kernels.triton_kernels import launch

TARGETS = {
    name: GPUTarget("hip", name, limits.warp_size)
    if limits.capability is None
    else GPUTarget("cuda", 10 * limits.capability[0] + limits.capability[1], limits.warp_size)
    for name, limits in ARCHITECTURES.items()
}
CACHE = Path(__file__).resolve().parents[2] / "build" / "gpu-resources"
_NAMES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64",
    torch.bool: "i1", torch.uint8: "u8",
}  # fmt: skip
_TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


class Launch(NamedTuple):
    """A kernel and its launch arguments and options."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes
    ----------
    registers : int
        Of a thread. On AMD vector and accumulation registers together.
    spilled : int
        On NVIDIA bytes of stack and instructions that read or write local memory, on AMD spilled registers.
    shared : int
        Bytes of a block.
    warps : int
        Of a block.
    matrix : dict
        How many matrix instructions of each kind.
    products : dict
        How many products its TTIR has of each precision.
    """

    registers: int
    spilled: int
    shared: int
    warps: int
    matrix: dict[str, int]
    products: dict[str, int]


@contextlib.contextmanager
def _architecture(name: str) -> Iterator[None]:
    with (
        mock.patch.object(launch, "architecture", lambda device: name),
        mock.patch.object(tile_lists, "wanted", lambda device: True),
    ):
        yield


def record(call: Callable[[], object], architecture: str) -> list[Launch]:
    """Record, without running, the launches that ``call`` makes on ``architecture``."""
    launches = []

    def run(self, *args, grid, warmup, **kwargs):
        names = self.arg_names
        options = {name: value for name, value in kwargs.items() if name not in names}
        arguments = dict(zip(names, args)) | {name: value for name, value in kwargs.items() if name in names}
        launches.append(Launch(self, arguments, options))

    with mock.patch.object(JITFunction, "run", run), _architecture(architecture):
        call()
    return launches


def build(recorded: Launch, architecture: str, cache: Path = CACHE) -> Resources:
    """Return a launch's resources on an architecture, from ``cache`` if nothing it depends on has changed."""
    signature, constants, attributes = _specialised(recorded)
    # The kernel's cache key is a hash of its source and that of all functions it calls.
    parts = (recorded.kernel.cache_key, signature, constants, attributes, recorded.options, architecture, _versions())
    by_source = _file(cache, parts)
    if by_source.exists():
        return Resources(**json.loads(by_source.read_text()))
    # The TTIR excludes names and comments, and takes a fraction of the compile time.
    by_ttir = _file(cache, (ttir(recorded, architecture), recorded.options, architecture, _versions()))
    if not by_ttir.exists():
        _write(by_ttir, _read(compile_launch(recorded, architecture), architecture))
    resources = Resources(**json.loads(by_ttir.read_text()))
    _write(by_source, resources)
    return resources


def _file(cache: Path, parts: tuple) -> Path:
    return cache / f"{hashlib.sha256(repr(parts).encode()).hexdigest()}.json"


def _write(file: Path, resources: Resources) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(dataclasses.asdict(resources)))
    partial.replace(file)


def _read(compiled: CompiledKernel, architecture: str) -> Resources:
    read = _read_amd if architecture.startswith("gfx") else _read_nvidia
    registers, spilled, matrix = read(compiled)
    taken = (compiled.metadata.shared, compiled.metadata.num_warps)
    return Resources(registers, spilled, *taken, matrix, _products(compiled.asm["ttir"]))


def compile_launch(recorded: Launch, architecture: str) -> CompiledKernel:
    """Compile a launch for an architecture."""
    return triton.compile(_source(recorded), target=TARGETS[architecture], options=recorded.options)


def ttir(recorded: Launch, architecture: str) -> str:
    """Return the TTIR of a launch's kernel, with functions numbered instead of named."""
    source, target = _source(recorded), TARGETS[architecture]
    backend = make_backend(target)
    options = backend.parse_options({**recorded.options, **source.parse_options()})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    builders = backend.get_codegen_implementation(options)
    module = source.make_ir(target, options, builders, backend.get_module_map(), context)
    numbers: dict[str, int] = {}
    functions = re.compile(r"@[\w.$]+|@\"[^\"]*\"")
    return functions.sub(lambda name: f"@{numbers.setdefault(name[0], len(numbers))}", module.str_nodebug())


def _source(recorded: Launch) -> ASTSource:
    signature, constants, attributes = _specialised(recorded)
    source = GluonASTSource if recorded.kernel.is_gluon() else ASTSource
    return source(recorded.kernel, signature=signature, constexprs=constants, attrs=attributes)


def _specialised(recorded: Launch) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], list]]:
    """Return the signature, constants and attributes of a launch's arguments, as Triton computes them."""
    signature: dict[str, str] = {}
    constants, attributes = {}, {}
    for index, parameter in enumerate(recorded.kernel.params):
        value = recorded.arguments[parameter.name]
        if (
            parameter.is_constexpr
            or value is None
            or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize)
        ):
            # Triton specializes these to constants.
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _NAMES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            box, layout = list(value.block_shape), value.layout
            signature[parameter.name] = f"tensordesc<{_NAMES[value.base.dtype]}{box},{layout!r}>"
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return signature, constants, attributes


@functools.cache
def _versions() -> tuple[str, str]:
    """Return Triton's version and a hash of the functions that read a kernel: cached results depend on both."""
    readers = (Resources, _read, _read_amd, _read_nvidia, _products, machine_code)
    return triton.__version__, hashlib.sha256("".join(map(inspect.getsource, readers)).encode()).hexdigest()


def _products(ttir: str) -> dict[str, int]:
    """Count the products of a kernel by precision; one that names none is IEEE."""
    found = (re.search(r"inputPrecision = (\w+)", line) for line in re.findall(r"tt\.dot .*", ttir))
    return dict(collections.Counter(match.group(1) if match else "ieee" for match in found))


def machine_code(compiled: CompiledKernel) -> tuple[str, str]:
    """Return what NVIDIA's tools say of a kernel's resources, and its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([f"{_TOOLS}/cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
        code = subprocess.run([f"{_TOOLS}/nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
    return usage.stdout + usage.stderr, code


def _read_nvidia(compiled: CompiledKernel) -> tuple[int, int, dict[str, int]]:
    usage, code = machine_code(compiled)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    words = collections.Counter(re.findall(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA|LDL|STL)\b", code))
    return registers, stack + words.pop("LDL", 0) + words.pop("STL", 0), dict(words)


def _read_amd(compiled) -> tuple[int, int, dict[str, int]]:
    code = compiled.asm["amdgcn"]
    field = {name: int(value) for name, value in re.findall(r"\.(\w+):\s*(\d+)$", code, re.M)}
    return field["vgpr_count"], field["vgpr_spill_count"], {"MFMA": len(re.findall(r"v_mfma", code))}
