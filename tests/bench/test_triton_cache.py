"""A Triton cache packed on one machine works on another, in a different folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu_report import triton_cache

ROOT = Path(__file__).parents[2]
# Compiles a kernel for a GPU that is not present, in a new process, since Triton reads its options at import.
PROGRAM = """
import sys, time, torch
from bench.gpu_report import triton_cache
import refrag_kernels as rk

out, lse = torch.zeros(8, 4, 64, dtype=torch.bfloat16), torch.zeros(8, 4)
call = lambda: rk.merge_states(out, lse, out, lse)
found = triton_cache.compile_calls([("merge", call), ("again", call)], time.monotonic() + 100)
print("found", len(found.compiled), len(found.cached))
"""


def compiled(folder):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder), "TRITON_STORE_BINARY_ONLY": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_a_kernel_is_compiled_once(tmp_path):
    made = tmp_path / "made"
    assert compiled(made) == "found 1 0"
    triton_cache.pack(made, tmp_path / "cache.tar.xz")
    moved = triton_cache.unpack(tmp_path / "cache.tar.xz", tmp_path / "elsewhere")
    for path in made.rglob("*"):
        path.unlink() if path.is_file() else None
    assert compiled(moved) == "found 0 1"


def test_only_what_triton_reads_is_packed(tmp_path):
    folder = tmp_path / "made" / "KEY"
    folder.mkdir(parents=True)
    for name in ("a_kernel.json", "a_kernel.cubin", "a_kernel.ttgir", "launcher.so", "__grp__a_kernel.json"):
        (folder / name).write_text("{}")
    for archive in ("cache.tar.xz", "cache.tar.gz", "cache.tar"):
        triton_cache.pack(tmp_path / "made", tmp_path / archive)
        moved = triton_cache.unpack(tmp_path / archive, tmp_path / f"from-{archive}") / "KEY"
        names = {"a_kernel.json", "a_kernel.cubin", "launcher.so", "__grp__a_kernel.json"}
        assert {path.name for path in moved.iterdir()} == names
        group = json.loads((moved / "__grp__a_kernel.json").read_text())["child_paths"]
        assert group == {name: str(moved / name) for name in ("a_kernel.json", "a_kernel.cubin")}


def test_the_command_line(tmp_path):
    (tmp_path / "made").mkdir()
    assert triton_cache.main(["pack", str(tmp_path / "made"), str(tmp_path / "cache.tar")]) == 0
    assert (tmp_path / "cache.tar").exists()
    with pytest.raises(SystemExit):
        triton_cache.main([])


def test_blocks_make_their_launches_without_a_gpu(monkeypatch):
    """Record the launches that would be precompiled, with real shapes except for the largest."""
    from bench.gpu_report import catalogue, pretended
    from bench.static.ahead_of_time import record

    monkeypatch.setattr(pretended, "_MOST", 2e7)
    launches = {name: record(call, "sm_90") for name, call in pretended.calls()}
    absent = {block.name for block in catalogue.CATALOGUE if block.absent}
    assert set(launches) | absent >= {"L2 read", "grid_order", "decode_sweep", "gluon"} and all(launches.values())
