"""Dry runs of the GPU report's blocks that compare program orders and decode variants."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu_report import schema

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def dry_run(name, tmp_path):
    """Run a block as the report does; return its results by case and contender."""
    file = tmp_path / "results.jsonl"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    for variable in [variable for variable in environment if variable.startswith("PYTEST_")]:
        del environment[variable]
    words = [sys.executable, "-m", f"bench.gpu_report.blocks.{name}", "--device", "cpu", "--seconds", "30"]
    done = subprocess.run(
        [*words, "--results", str(file)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [problem for line in lines for problem in schema.problems(line)] == []
    assert {line["block"] for line in lines} == {name} and all("status" not in line for line in lines)
    cases = {}
    for line in lines:
        cases.setdefault(line["case"], {})[line.get("contender")] = line
    return cases


def test_orders(tmp_path):
    cases = dry_run("grid_order", tmp_path)
    assert list(cases)[:2] == ["empty kernel", "L2 read"] and cases["L2 read"][None]["bytes_per_s"] > 0
    names = [case.partition(",")[0] for case in list(cases)[2:]]
    assert names == ["passages", "prompt", "causal", "backward of passages"]
    for case, found in list(cases.items())[2:]:
        ours = {name: line for name, line in found.items() if name.startswith("triton")}
        assert len(ours) == (2 if case.startswith("backward") else 4)
        assert all(line["bits_of_the_first"] for line in ours.values())
        assert ours["triton, tiles first"]["section"] == 0
        assert all(line["median_s"] > 0 and line["tflops"] > 0 for line in found.values())


def test_ways_to_decode(tmp_path):
    cases = dry_run("decode_sweep", tmp_path)
    assert len(cases) == 2
    for found in cases.values():
        assert "SDPA, contiguous keys" in found and len(found) == 4
        assert all(line["median_s"] > 0 and line["share_of_copy"] > 0 for line in found.values())


def test_each_order_comes_once():
    import torch

    from bench.gpu_report.block import Options
    from bench.gpu_report.blocks import grid_order
    from refrag_kernels.grid_order import TILES_FIRST, Order

    options = Options("cuda", 0.0)
    orders = grid_order._orders(torch.empty(4096, 32, 128, dtype=torch.bfloat16, device="meta"), options)
    assert list(orders.values()) == [TILES_FIRST, Order(11, 264), Order(32, 0), Order(11, 0)]
    orders = grid_order._orders(torch.empty(4096, 8, 128, dtype=torch.bfloat16, device="meta"), options)
    assert list(orders) == ["tiles first", "a wave of all heads, then sections", "all heads"]
