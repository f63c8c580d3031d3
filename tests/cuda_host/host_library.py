"""Compile the device headers of csrc/cuda for the CPU, and call them with CPU tensors."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import runpy
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "cuda_host"
ALL = os.environ.get("REFRAG_GPU_PROOF") == "all"  # set by make test-gpu-proof; make test runs a sample
# The folder of cuda/*.cuh. Tests of the checkers replace it with a broken copy.
SOURCES = Path(os.environ.get("REFRAG_KERNELS_CUDA_SOURCES", ROOT / "csrc"))

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ORDERS = ("forward", "reversed", "shuffled")

_FLAGS = "-std=c++20 -O2 -g1 -fPIC -shared -Wall -Wextra -Wno-unknown-pragmas -fvisibility=default -DREFRAG_CUDA_HOST"


def sanitizer_flags(sanitizer: str) -> list[str]:
    flags = [f"-fsanitize={sanitizer}", "-fno-omit-frame-pointer"]
    # With use-after-scope checks the unrolled kernels take minutes each to compile.
    return flags + ["-fno-sanitize-address-use-after-scope"] * (sanitizer == "address")


def compile_library(source: Path, *extra: str) -> Path:
    """Compile a file of C functions, unless a build of the same sources with the same flags exists."""
    sanitize = os.environ.get("REFRAG_KERNELS_SANITIZE", "")
    flags = [*shlex.split(_FLAGS), f"-I{HERE}", f"-I{SOURCES}", *extra]
    if sanitize:
        flags += sanitizer_flags(sanitize)
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    state = hashlib.sha256(" ".join([*compiler, *flags]).encode())
    for path in [source, *sorted(HERE.rglob("*.h")), *sorted((SOURCES / "cuda").iterdir())]:
        state.update(path.read_bytes())
    library = CACHE / f"{source.stem}-{state.hexdigest()[:16]}.so"
    CACHE.mkdir(parents=True, exist_ok=True)
    # Test processes that need the same library wait for the one that compiles it.
    with open(CACHE / f"{source.stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            partial = library.with_suffix(".partial")
            subprocess.run([*compiler, *flags, str(source), "-o", str(partial)], check=True)
            partial.rename(library)
    return library


@functools.cache
def load(name: str) -> ctypes.CDLL:
    """Return the library of ``name``.cpp, compiling it if needed."""
    return ctypes.CDLL(str(compile_library(HERE / f"{name}.cpp")))


def compile_torch_library(source: Path, *extra: str) -> Path:
    """Compile a file of torch ops that includes csrc/cuda/launch.h, with our own runtime in place of CUDA's."""
    root = Path(torch.__file__).parent
    target = "0x{:02x}{:02x}000000000000ULL".format(*runpy.run_path(str(ROOT / "setup.py"))["target_torch"]())
    flags = [f"-I{HERE / 'fake_runtime'}", "-isystem", str(root / "include"), "-DUSE_CUDA", *extra]
    flags += [f"-DTORCH_TARGET_VERSION={target}", "-Wl,--no-as-needed", f"-L{root / 'lib'}", "-ltorch_cpu"]
    return compile_library(source, *flags)


class LaunchError(RuntimeError):
    """Raised for a launch that the host aborted, for example because of divergent barriers."""


def call(library: ctypes.CDLL, function: str, *args) -> None:
    """Call a C function that returns null or an error message. Tensors are passed as addresses, lists as C arrays."""
    entry = getattr(library, function)
    entry.restype = ctypes.c_char_p
    error = entry(*map(_argument, args))
    if error is not None:
        raise LaunchError(error.decode())


def _argument(value):
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, bool):
        return ctypes.c_int(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)  # also valid for an int in a register
    if isinstance(value, torch.dtype):
        return ctypes.c_int(ELEMENTS[value])
    return value


def pointers(*tensors: torch.Tensor | None) -> ctypes.Array:
    """Return a C array of the tensors' addresses."""
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def int64s(values: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


def ints(values: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int * len(values))(*values)


@contextlib.contextmanager
def options(
    library: ctypes.CDLL, order: str = "forward", *, seed: int = 0, early_copies: bool = False
) -> Iterator[None]:
    """Set the order of a CTA's threads, and whether copies happen as early or as late as possible."""
    library.set_options(ORDERS.index(order), seed, early_copies)
    try:
        yield
    finally:
        library.set_options(0, 0, 0)


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of ``tensor`` within a larger allocation, for ``check_guard``."""
    bytes_ = tensor.numel() * tensor.element_size()
    storage = torch.full((bytes_ + 256,), 0xFF, dtype=torch.uint8)
    start = -storage.data_ptr() % 64 + 64  # the view is 64-byte aligned, whatever the allocator returns
    view = storage[start : start + bytes_].view(tensor.dtype).view(tensor.shape)
    view.copy_(tensor)
    return view


def check_guard(tensor: torch.Tensor) -> None:
    """Raise AssertionError if memory around a tensor from ``guarded`` was written."""
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    first = tensor.storage_offset() * tensor.element_size()
    last = first + tensor.numel() * tensor.element_size()
    assert bool((storage[:first] == 0xFF).all()), "written before the start of an output"
    assert bool((storage[last:] == 0xFF).all()), "written beyond the end of an output"
