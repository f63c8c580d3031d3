"""Report the resources of each GPU kernel per architecture: ``python -m bench.resources`` writes docs/gpu-resources.md.

Kernels are compiled ahead of time and the compiled code is analyzed, so that no GPU is needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import triton

from bench.static import ahead_of_time, cuda_resources, launches
from refrag_kernels.architectures import ARCHITECTURES, TRITON

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu-resources.md"
# sm_86 has nearly the same kernels as sm_80.
SHOWN = tuple(name for name in TRITON if name != "sm_86")


@dataclasses.dataclass(frozen=True)
class Row:
    """A compiled kernel and its resources per CTA; see ``ahead_of_time.Resources``."""

    kernel: str
    shape: str
    dtype: str
    architecture: str
    registers: int
    spilled: int
    shared: int
    warps: int
    matrix: str = ""
    tile: str = ""

    @property
    def blocks(self) -> int:
        """Resident CTAs per multiprocessor."""
        return ARCHITECTURES[self.architecture].resident_ctas(self.registers, self.shared, self.warps)


def triton_rows(architectures: Sequence[str] = SHOWN, progress: bool = False) -> list[Row]:
    """Return a row for each Triton kernel that an op launches, by head_dim, dtype and architecture."""
    rows: dict[Row, None] = {}
    for case in launches.CASES:
        for architecture in architectures:
            if progress:
                print(f"{case} {architecture}", file=sys.stderr, flush=True)
            for recorded in ahead_of_time.record(case.call, architecture):
                built = ahead_of_time.build(recorded, architecture)
                matrix = ", ".join(f"{count} {name}" for name, count in built.matrix.items() if count)
                taken = (built.registers, built.spilled, built.shared, built.warps, matrix)
                name = recorded.kernel.__name__.removesuffix("_kernel")
                shape, tile = _shape(case, recorded)
                rows[Row(name, shape, str(case.dtype)[6:], architecture, *taken, tile)] = None
    return list(rows)


def tile_rows(recorded: ahead_of_time.Launch) -> int:
    """Return the number of rows in the tiles that a kernel multiplies."""
    a = recorded.arguments
    if "BLOCK_M" in a:
        return a["BLOCK_M"]
    # Tiles of query rows hold the rows of several heads.
    return a["HEADS"] * a.get("ROWS", a.get("BLOCKS", 1) * 16)


def _shape(case: launches.Case, recorded: ahead_of_time.Launch) -> tuple[str, str]:
    """Return a kernel's specialization for a call, and the tile chosen for it."""
    a = recorded.arguments
    parts = [f"D {case.head_dim}"] if case.head_dim else []
    parts += ["rotated"] if a.get("HALF") else []
    tile = ""
    if "GROUP" in a and "BLOCK_N" in a:
        tile = f"{tile_rows(recorded)} x {a['BLOCK_N']}"
        parts += [f"{a['GROUP']} heads per key", *(["softcap"] if a["SOFTCAP"] else [])]
        parts += ["short KV"] if a.get("BLOCKS") == 1 and a["BLOCK_N"] == 16 else []
    elif "BLOCK_K" in a:
        tile = f"{a['BLOCK_M']} x {a['BLOCK_N']} x {a['BLOCK_K']}"
        parts += [case.name.split("-")[2].replace("N", "N "), *(["listed rows"] if a["LISTED"] else [])]
    return ", ".join(parts), tile


def triton_tables() -> str:
    """Return a summary and a table for each Triton kernel, as Markdown."""
    rows = triton_rows()
    return f"{summary(rows)}\n{tables(rows)}"


def summary(rows: Iterable[Row]) -> str:
    """Return the number of variants that spill and the lowest occupancy, by architecture, as Markdown."""
    kinds: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        kind = "float32" if row.dtype == "float32" else "16 bits, D 256" if "D 256" in row.shape else "16 bits"
        kinds.setdefault(kind, {}).setdefault(row.architecture, []).append(row)
    architectures = dict.fromkeys(architecture for found in kinds.values() for architecture in found)
    lines = ["| variants / that spill / lowest occupancy, warps | " + " | ".join(architectures) + " |"]
    lines += ["| --- " * (1 + len(architectures)) + "|"]
    for kind, found in sorted(kinds.items()):
        cells = []
        for of_kind in (found.get(architecture, []) for architecture in architectures):
            spilling, warps = sum(row.spilled > 0 for row in of_kind), [row.blocks * row.warps for row in of_kind]
            cells.append(f"{len(of_kind)} / {spilling} / {min(warps)}" if of_kind else "-")
        lines.append("| " + " | ".join([kind, *cells]) + " |")
    return "\n".join(lines) + "\n"


def tables(rows: Iterable[Row]) -> str:
    """Return a table for each kernel with a column for each architecture, as Markdown; ``page`` explains the cells."""
    found: dict[str, dict[tuple[str, str], dict[str, list[str]]]] = {}
    architectures: dict[str, None] = {}
    for row in rows:
        architectures[row.architecture] = None
        line = found.setdefault(row.kernel, {}).setdefault((row.shape, row.dtype), {})
        spilled = f"**{row.spilled}**" if row.spilled else "0"
        parts = [str(row.registers), spilled, str(row.shared), f"{row.blocks} x {row.warps}"]
        parts += [part for part in (row.matrix, row.tile) if part]
        line.setdefault(row.architecture, []).append(" / ".join(parts))
    lines = []
    for kernel, shapes in found.items():
        lines += [f"### {kernel}", "", "| shape | dtype | " + " | ".join(architectures) + " |"]
        lines += ["| --- " * (2 + len(architectures)) + "|"]
        for (shape, dtype), cells in shapes.items():
            # A call may launch a kernel twice, such as both layers of the projection.
            each = ["<br>".join(dict.fromkeys(cells.get(architecture, ["-"]))) for architecture in architectures]
            lines.append("| " + " | ".join([shape, dtype, *each]) + " |")
        lines.append("")
    return "\n".join(lines)


def cuda_section(release: bool = False) -> tuple[str, str]:
    """Return title and Markdown table of the CUDA C++ kernels, for this build's or a release's architectures."""
    before = (
        "Cells: registers per thread / spilled bytes / resident CTAs per multiprocessor; - if the launchers select\n"
    )
    before += "another variant for the architecture.\n\n"
    binaries = [cuda_resources.compile_release()] if release else []
    return f"CUDA C++, {cuda_resources.compiler()}", before + cuda_resources.markdown(*binaries)


def page(sections: dict[str, str]) -> str:
    """Return the page; ``sections`` maps titles to tables."""
    lines = [
        "# GPU resources",
        "",
        "Resources of the compiled kernels, read from their code. For times, see [GPU results](gpu-results.md).",
        "Written by `python -m bench.resources --release`; `make test-gpu-proof` checks that it is up to date.",
        "",
        "The first table is a summary: the number of compiled variants (shapes and dtypes), how many of them spill,",
        "and the lowest occupancy in warps per multiprocessor (AMD: compute unit).",
        "",
        "Cells of Triton's tables: registers per thread / spills, in bold if there are any / bytes of shared memory",
        "per CTA / resident CTAs per multiprocessor x warps per CTA / matrix instructions / the tile selected for the",
        "architecture. Spills are an error in bfloat16 and float16 up to D 128, and reported for float32 and D 256.",
    ]
    for title, body in sections.items():
        lines += ["", f"## {title}", "", body.strip()]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser("python -m bench.resources", description=__doc__)
    parser.add_argument("--output", type=Path, default=PAGE)
    parser.add_argument(
        "--release", action="store_true", help="compile csrc/cuda for all architectures of a release (minutes)"
    )
    options = parser.parse_args(arguments)
    triton_rows(progress=True)
    # Another backend adds its kernels as a title and tables.
    cuda, table = cuda_section(options.release)
    sections = {f"Triton {triton.__version__}": triton_tables(), cuda: table}
    options.output.write_text(page(sections))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
