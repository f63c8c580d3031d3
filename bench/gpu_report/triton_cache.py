"""Prepare a Triton cache on a machine without a GPU, to save time on the GPU machine: compile, pack, unpack.

``python -m bench.gpu_report.triton_cache compile FILE`` compiles the blocks' launches for sm_90 with this environment's
Triton; ``bench/gpu_report.sh --triton-cache FILE`` uses the result. A cache key covers a kernel's source, its line
number, its arguments, and Triton's own files, so the other machine needs the same checkout, the same Triton wheel and
the same minor version of Python. ``pack FOLDER FILE`` packs a folder filled by runs on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from unittest import mock

from bench.gpu_report import compilations

_KEPT = (".json", ".cubin", ".so")  # the files that Triton loads for a kernel, and its launcher modules
_GROUP = "__grp__"  # the file that lists a kernel's files with absolute paths


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser("python -m bench.gpu_report.triton_cache", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    make = commands.add_parser("compile", help="compile for a GPU that is not present, and pack")
    make.add_argument("file", type=Path, help="archive to write, such as cache.tar.xz")
    make.add_argument("--seconds", type=float, default=1800, help="time budget; default 1800")
    again = commands.add_parser("check", help="check whether this environment would recompile any kernel of an archive")
    again.add_argument("file", type=Path)
    again.add_argument("--seconds", type=float, default=1800)
    old = commands.add_parser("pack", help="pack a TRITON_CACHE_DIR folder")
    old.add_argument("folder", type=Path)
    old.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "pack":
        pack(options.folder, options.file)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if options.command == "check":
            unpack(options.file, Path(folder))
        os.environ |= {"TRITON_CACHE_DIR": folder, "TRITON_STORE_BINARY_ONLY": "1"}
        found = compile_calls(calls(), time.monotonic() + options.seconds)
        if options.command == "compile":
            pack(Path(folder), options.file)
    size = options.file.stat().st_size / 1e6
    print(f"{len(found.compiled)} kernels compiled, {len(found.cached)} from the cache; {options.file}: {size:.1f} MB")
    return 1 if options.command == "check" and found.compiled else 0


def pack(folder: Path, archive: Path) -> None:
    """Pack the files of a cache folder that Triton needs; ``unpack`` recreates the file lists."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    mode = {".xz": "w:xz", ".gz": "w:gz"}.get(archive.suffix, "w")
    with tarfile.open(archive, mode) as file:
        for path in sorted(folder.glob("*/*")):
            if path.suffix in _KEPT and not path.name.startswith(_GROUP):
                file.add(path, path.relative_to(folder))


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a cache, recreate the file lists with the new paths, and return the folder for TRITON_CACHE_DIR."""
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    for path in folder.glob("*/*.json"):
        group = {other.name: str(other) for other in path.parent.glob(f"{path.stem}.*")}
        path.with_name(f"{_GROUP}{path.name}").write_text(json.dumps({"child_paths": group}))
    return folder


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the report's calls of the Triton backend, on CPU tensors whose values are never read."""
    from bench.engine.case import Skip
    from bench.gpu_report import known_launches, pretended
    from bench.gpu_report.blocks import ops

    for name, make in known_launches.CALLS.items():
        yield name, make("cpu")
    yield from pretended.calls()
    for entry in ops.entries("cuda"):
        # Larger problems launch the same kernels.
        if max(entry.parameters.get("context", 0), entry.parameters.get("batch", 0) * 256) <= 4096:
            entry = _on_cpu(entry)
            try:
                yield entry.name, entry.build().ours
            except Skip:
                continue


def _on_cpu(entry):
    """Return a row with its tensors on the CPU; its builder got the device as a positional or keyword argument."""
    import dataclasses
    import functools

    build = entry.build
    given = tuple("cpu" if argument == "cuda" else argument for argument in build.args)
    named = {name: "cpu" if value == "cuda" else value for name, value in build.keywords.items()}
    return dataclasses.replace(entry, build=functools.partial(build.func, *given, **named))


def compile_calls(named: Iterable[tuple[str, Callable[[], object]]], deadline: float) -> compilations.Compilations:
    """Make calls whose launches are compiled for sm_90 but not run; return the compilations."""
    import torch

    import refrag_kernels as rk

    with _no_gpu(), compilations.counted() as found, torch.enable_grad():
        for name, call in named:
            if time.monotonic() > deadline:
                print(f"ran out of time before {name}", file=sys.stderr)
                break
            before = len(found.compiled)
            try:
                with rk.use_backend("triton"):
                    call()
            except Exception as error:  # the GPU machine compiles what the cache lacks
                print(f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
            print(f"{len(found.compiled) - before:3} kernels: {name}", flush=True)
    return found


@contextlib.contextmanager
def _no_gpu() -> Iterator[None]:
    """Make Triton compile for sm_90, specialized for the real arguments, without launching anything."""
    import dataclasses

    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import build, driver
    from triton.runtime.jit import JITFunction

    from bench.static.ahead_of_time import _architecture
    from refrag_kernels import selection

    class Stub:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    launch = JITFunction.run

    def run(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        nvidia.CudaLauncher(kernel.src, kernel.metadata)  # compiles its launcher module
        return kernel

    triton = dataclasses.replace(selection.BACKENDS["triton"], devices=("cpu", "cuda"), why_missing=lambda: None)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(JITFunction, "run", run),
        mock.patch.dict(selection.BACKENDS, triton=triton),
        mock.patch.object(driver, "_active", Stub()),
        mock.patch.object(build, "_load_module_from_path", lambda name, path: mock.MagicMock()),
        _architecture("sm_90"),
    ):
        # Launchers link against the driver library, which is not loaded here, so an empty one suffices.
        library = Path(folder) / "libcuda.so.1"
        subprocess.run(["cc", "-shared", "-o", str(library), "-x", "c", "/dev/null"], check=True)
        os.environ["TRITON_LIBCUDA_PATH"] = folder
        nvidia.CudaUtils()
        try:
            yield
        finally:
            del os.environ["TRITON_LIBCUDA_PATH"]


if __name__ == "__main__":
    raise SystemExit(main())
