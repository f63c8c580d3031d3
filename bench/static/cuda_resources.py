"""Read the CUDA kernels' resources on each architecture from their machine code; no GPU is needed.

``python -m bench.static.cuda_resources`` compiles csrc/cuda for a release's architectures and prints the table of
docs/gpu-resources.md.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.util
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import triton

import refrag_kernels
from refrag_kernels.architectures import ARCHITECTURES, CUDA, KIB

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path(refrag_kernels.__file__).parent / "_C.so"
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


# Less than half the shared memory of the others, so launchers choose smaller tiles.
SMALL = tuple(name for name in CUDA if ARCHITECTURES[name].shared_memory_per_sm == 100 * KIB)


class Configuration(NamedTuple):
    """A kernel's launch configuration, and the resident CTAs per multiprocessor that it should reach."""

    threads: int
    blocks: int
    shared: int = 0  # dynamic shared memory in bytes
    # Architectures on which the launchers choose it; the kernel is compiled for all of them.
    architectures: tuple[str, ...] = CUDA


def _attention(head_dim: int, tiles: int) -> int:
    """Return shared memory for two stages of key and value tiles with mask bits, and three tile lists."""
    return 2 * tiles * (2 * 16 * head_dim * 2 + 4 * 32) + 3 * (1 + 2 * tiles + 4 * tiles) * 4


def _paged(head_dim: int, warps: int) -> int:
    """Return shared memory for two stages of 16 keys and values per warp, and three key lists."""
    return 2 * warps * 2 * 16 * head_dim * 2 + 3 * (1 + 2 * 16 * warps + 17 * warps // 2) * 4


_LARGE = tuple(name for name in CUDA if name not in SMALL)
# Keyed by kernel and integer template arguments.
CONFIGURATIONS = {
    ("mixed_attention_kernel", 64, 4): Configuration(128, 2, _attention(64, 4)),
    ("mixed_attention_kernel", 96, 4): Configuration(128, 2, _attention(96, 4), _LARGE),
    ("mixed_attention_kernel", 96, 3): Configuration(128, 2, _attention(96, 3), SMALL),
    ("mixed_attention_kernel", 128, 4): Configuration(128, 2, _attention(128, 4), _LARGE),
    ("mixed_attention_kernel", 128, 2): Configuration(128, 2, _attention(128, 2), SMALL),
    ("paged_attention_kernel", 64, 4): Configuration(128, 2, _paged(64, 4)),
    ("paged_attention_kernel", 96, 4): Configuration(128, 2, _paged(96, 4), _LARGE),
    ("paged_attention_kernel", 96, 2): Configuration(64, 3, _paged(96, 2), SMALL),
    ("paged_attention_kernel", 128, 4): Configuration(128, 2, _paged(128, 4), _LARGE),
    ("paged_attention_kernel", 128, 2): Configuration(64, 2, _paged(128, 2), SMALL),
    **{("small_m_projection_kernel", tiles): Configuration(256, 2, 8 * tiles * 8 * 16 * 4) for tiles in (1, 2, 4, 8)},
}
# Kernels that only move rows use no shared memory; at least 1024 of a multiprocessor's 1536 or 2048 threads.
_MOVERS = {
    "append_kv_kernel": 128,
    "assemble_mixed_kernel": 128,
    "merge_splits_kernel": 128,
    "merge_states_kernel": 128,
    "pool_chunks_kernel": 256,
}


class Kernel(NamedTuple):
    """A kernel compiled for one architecture, its resources and its occupancy."""

    name: str
    types: tuple[str, ...]  # template arguments: element types,
    numbers: tuple[int, ...]  # and integers
    architecture: str
    registers: int  # per thread
    stack: int  # bytes per thread; 0 unless registers are spilled
    static_shared: int  # bytes; the kernels use dynamic shared memory
    configuration: Configuration
    occupancy: int  # resident CTAs per multiprocessor
    symbol: str

    @property
    def chosen(self) -> bool:
        """Whether the launchers choose the kernel on this architecture."""
        return self.architecture in self.configuration.architectures


_TYPES = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16", "j": "4 bytes", "t": "2 bytes"}


def _parse(symbol: str) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
    """Parse ``_ZN6refrag4cuda<length><name>I<arguments>E...``."""
    length, rest = re.match(r"_ZN6refrag4cuda(\d+)(.*)", symbol).groups()
    name, arguments = rest[: int(length)], rest[int(length) + 1 :]
    types = re.match(r"f|j|t|\d+__(?:half|nv_bfloat16)|NS0_5WordsE", arguments)
    numbers = re.match(r"(?:Li\d+E)*", arguments[types.end() :]).group()
    return name, (_TYPES.get(types.group(), "16 bytes"),), tuple(map(int, re.findall(r"\d+", numbers)))


def configuration_of(name: str, numbers: tuple[int, ...]) -> Configuration:
    if name in _MOVERS:
        return Configuration(_MOVERS[name], 1024 // _MOVERS[name])
    return CONFIGURATIONS[(name, *numbers)]


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


@functools.cache
def _setup_py():
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def compile_release() -> list[Path]:
    """Compile csrc/cuda for a release's architectures and return the objects. The first time takes minutes."""
    setup_py = _setup_py()
    toolkit = setup_py.Cuda.find()
    if toolkit is None:
        raise SystemExit("compiling the CUDA kernels needs nvcc (CUDA_HOME or PATH)")
    build = Path("build") / "release-cuda"
    ninja = setup_py.NinjaFile(build, dataclasses.replace(toolkit, archs=setup_py.RELEASE_ARCHS))
    (ROOT / build).mkdir(parents=True, exist_ok=True)
    (ROOT / build / "build.ninja").write_text(str(ninja))
    objects = [f"{build}/{source}.o" for source in ninja.sources("cuda/*.cu")]
    command = [sys.executable, "-m", "ninja", "--quiet", "-f", str(build / "build.ninja"), *objects]
    subprocess.run(command, cwd=ROOT, check=True)
    return [ROOT / path for path in objects]


def read(binaries: Sequence[Path] = (LIBRARY,)) -> list[Kernel]:
    """Return the kernels in shared libraries or object files, per architecture; empty without device code."""
    return [kernel for binary in binaries for kernel in _read(binary)]


def _read(binary: Path) -> list[Kernel]:
    kernels = []
    for part in re.split(r"^arch = ", _run("cuobjdump", "-res-usage", str(binary)), flags=re.M)[1:]:
        architecture = part.split()[0]
        for symbol, registers, stack, shared in re.findall(
            r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", part
        ):
            name, types, numbers = _parse(symbol)
            # From sm_90 on, the report includes the system's reserved shared memory for kernels with launch bounds.
            limits = ARCHITECTURES[architecture]
            own_shared = max(0, int(shared) - (limits.reserved_per_cta if limits.capability >= (9, 0) else 0))
            configuration = configuration_of(name, numbers)
            blocks = limits.resident_ctas(int(registers), configuration.shared, configuration.threads // 32)
            kernels.append(
                Kernel(
                    name, types, numbers, architecture, int(registers), int(stack), own_shared, configuration,
                    blocks, symbol,
                )
            )  # fmt: skip
    return kernels


def instructions(architecture: str, binaries: Sequence[Path] = (LIBRARY,)) -> dict[str, collections.Counter[str]]:
    """Count each kernel's machine instructions, by symbol; instruction names include their suffixes."""
    code = "".join(_run("cuobjdump", "-sass", "-arch", architecture, str(binary)) for binary in binaries)
    found = {}
    for part in re.split(r"Function : ", code)[1:]:
        # /*0120*/  @!P0 LDG.E.128 R4, [R2.64] ;
        words = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", part, flags=re.M)
        found[part.split()[0]] = collections.Counter(words)
    return found


def markdown(binaries: Sequence[Path] = (LIBRARY,)) -> str:
    """Return a Markdown table with a line for each kernel and a column for each architecture.

    Cells: registers per thread / spilled bytes / resident CTAs per multiprocessor; "-" if the launchers choose another
    kernel.
    """
    kernels = read(binaries)
    architectures = [name for name in CUDA if any(k.architecture == name for k in kernels)]
    header = ["kernel", "threads", "shared bytes", *architectures]
    lines = {}
    for kernel in sorted(kernels, key=lambda k: (k.name, k.types, k.numbers)):
        name = f"{kernel.name}<{', '.join(map(str, (*kernel.types, *kernel.numbers)))}>"
        shared = kernel.configuration.shared + kernel.static_shared
        cells = lines.setdefault((name, kernel.configuration.threads, shared), {})
        if kernel.chosen:
            cells[kernel.architecture] = f"{kernel.registers} / {kernel.stack} / {kernel.occupancy}"
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    rows += [[*line, *(cells.get(name, "-") for name in architectures)] for line, cells in lines.items()]
    return "".join("| " + " | ".join(map(str, row)) + " |\n" for row in rows)


def compiler() -> str:
    """Return the release of nvcc, which register counts depend on."""
    toolkit = _setup_py().Cuda.find()
    text = subprocess.run([toolkit.nvcc, "--version"], capture_output=True, text=True).stdout if toolkit else ""
    match = re.search(r"release ([\d.]+)", text)
    return f"nvcc {match.group(1)}" if match else "no nvcc"


if __name__ == "__main__":
    print(markdown(compile_release()), end="")
