"""What the assembler reports of each CUDA kernel, and what its shared memory leaves room for: no spills, and as many
blocks of threads on a multiprocessor as the kernel is laid out for. Read from the build's logs; no GPU is needed."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
REGISTERS = 65536  # of a multiprocessor, from sm_80 to sm_120
SHARED_KB = {
    80: 164,
    86: 100,
    89: 100,
    90: 228,
    100: 228,
    120: 100,
}  # of a multiprocessor; 1 KB of each block is the system's


class Claim(NamedTuple):
    """How many blocks of how many threads a kernel is laid out to have on a multiprocessor."""

    threads: int
    blocks: int
    shared: int = 0  # bytes that a launch asks for
    shared_architectures: tuple[int, ...] = tuple(SHARED_KB)


def _attention(width: int, tiles: int) -> int:
    """Two stages of tiles of keys and of values with their bits, and three lists of tiles."""
    return 2 * tiles * (2 * 16 * width * 2 + 4 * 32) + 3 * (1 + 2 * tiles + 4 * tiles) * 4


def _paged(width: int) -> int:
    """Two stages of 64 keys and values, and three lists of keys."""
    return 2 * 2 * 64 * width * 2 + 3 * (1 + 2 * 64 + 16 * 2 + 2) * 4


LARGE = (80, 90, 100)
CLAIMS = {
    ("mixed_attention_kernel", "64", "4"): Claim(128, 3, _attention(64, 4), LARGE),
    ("mixed_attention_kernel", "96", "4"): Claim(128, 2, _attention(96, 4), LARGE),
    ("mixed_attention_kernel", "128", "4"): Claim(128, 2, _attention(128, 4), LARGE),
    ("mixed_attention_kernel", "128", "2"): Claim(128, 2, _attention(128, 2)),
    ("paged_attention_kernel", "64"): Claim(128, 2, _paged(64)),
    ("paged_attention_kernel", "96"): Claim(128, 2, _paged(96), LARGE),
    ("paged_attention_kernel", "128"): Claim(128, 2, _paged(128), LARGE),
    **{("skinny_projection_kernel", str(tiles)): Claim(256, 2, 8 * tiles * 8 * 16 * 4) for tiles in (1, 2, 4, 8)},
}
# Kernels that only move rows: half of a multiprocessor's 2048 threads at least, without shared memory.
SIMPLE = {
    "append_kv_kernel": 128,
    "assemble_mixed_kernel": 128,
    "merge_splits_kernel": 128,
    "merge_states_kernel": 128,
    "pool_chunks_kernel": 256,
}


def name_of(mangled: str) -> tuple[str, ...]:
    """Return a kernel's name and its integer template arguments."""
    name = re.search(r"\d+(\w+?_kernel)I", mangled)
    assert name, mangled
    return (re.sub(r"^.*?4cuda\d+", "", name.group(1)), *re.findall(r"Li(\d+)E", mangled))


class Usage(NamedTuple):
    name: tuple[str, ...]
    architecture: int
    registers: int
    stack: int
    spilled: int
    static_shared: int


def usages() -> list[Usage]:
    found = []
    for log in sorted((ROOT / "build").glob("*/csrc/cuda/*.cu.o.log")):
        source = ROOT / log.relative_to(log.parents[2]).with_suffix("").with_suffix("")
        if not source.exists():
            continue
        for entry in re.split(r"ptxas info\s*: Compiling entry function ", log.read_text())[1:]:
            mangled, architecture = re.match(r"'(\w+)' for 'sm_(\d+)", entry).groups()
            stack, stores, loads = re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
            ).groups()
            shared = re.search(r"(\d+) bytes smem", entry)
            found.append(
                Usage(
                    name_of(mangled),
                    int(architecture),
                    int(re.search(r"Used (\d+) registers", entry).group(1)),
                    int(stack),
                    int(stores) + int(loads),
                    int(shared.group(1)) if shared else 0,
                )
            )
    return found


USAGES = usages()
needs_build = pytest.mark.skipif(not USAGES, reason="no build with CUDA kernels in this checkout")


@needs_build
def test_no_kernel_spills():
    assert {usage.architecture for usage in USAGES} >= {80, 90}
    for usage in USAGES:
        assert usage.stack == usage.spilled == 0, usage


@needs_build
def test_every_kernel_has_a_claim_that_holds():
    seen = set()
    for usage in USAGES:
        claim = CLAIMS.get(usage.name) or Claim(threads := SIMPLE[usage.name[0]], 1024 // threads)
        seen.add(usage.name)
        # Registers are handed out to warps in units of 8 a thread.
        assert -(-usage.registers // 8) * 8 * claim.threads * claim.blocks <= REGISTERS, usage
        # Shared memory comes from the launch only, see csrc/cuda/device.cuh.
        assert usage.static_shared == 0, usage
    assert seen >= set(CLAIMS)


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=map("-".join, CLAIMS))
def test_shared_memory_leaves_room_for_the_blocks(claim):
    for architecture in claim.shared_architectures:
        assert claim.blocks * (claim.shared + 1024) <= SHARED_KB[architecture] * 1024, architecture


def test_sizes_are_those_of_the_headers(tmp_path):
    """The sizes above are computed here; the headers compute them as well."""
    source = tmp_path / "sizes.cpp"
    sizes = {
        "mixed_attention_kernel": "AttentionShared<{}>::kBytes",
        "paged_attention_kernel": "PagedShared<{}>::kBytes",
        "skinny_projection_kernel": "skinny_shared_bytes<{}>()",
    }
    lines = [
        f"static_assert({sizes[name].format(', '.join(n))} == {claim.shared});" for (name, *n), claim in CLAIMS.items()
    ]
    headers = "".join(f'#include "cuda/{name}.cuh"\n' for name in ("attention", "paged", "projection"))
    source.write_text(headers + "using namespace refrag::cuda;\n" + "\n".join(lines))
    command = "c++ -std=c++20 -fsyntax-only -Wno-unknown-pragmas -DREFRAG_CUDA_HOST".split()
    done = subprocess.run(
        [*command, f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'cuda_host'}", str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
