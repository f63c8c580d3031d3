"""Describe the machine and its limits as JSON: ``python -m bench.machine --device cuda --json FILE``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.engine import limits
from refrag_kernels import backends

_QUERY = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem,ecc.mode.current,mig.mode.current"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what the build and the machine support, and write it with the machine's measured limits."""
    parser = argparse.ArgumentParser("python -m bench.machine")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=7, help="rounds per rate; the median is reported")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    report = backends.report()
    print(report)
    found = dataclasses.asdict(report) | {"gpu": gpu(), "libraries": libraries()}
    where = (options.rounds, options.device)
    rates = {f"matmul, {name}": limits.matmul_flops(getattr(torch, name), *where) for name in options.dtype}
    rates[limits.BANDWIDTH[options.device]] = limits.bandwidth(*where)
    for name, rate in rates.items():
        print(f"{name}: {rate / 1e12:.3f} T{'FLOP' if 'matmul' in name else 'B'}/s")
    if options.json:
        options.json.write_text(json.dumps(found | {"rates": rates}, indent=2) + "\n")
    return 0


def gpu() -> list[dict[str, str]]:
    """Return what nvidia-smi reports for each GPU; an empty list without an NVIDIA GPU."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    rows = done.stdout.strip().splitlines() if done.returncode == 0 else []
    return [dict(zip(_QUERY.split(","), (value.strip() for value in row.split(",")))) for row in rows]


def libraries() -> dict[str, str | None]:
    """Return the versions of the libraries that refrag_kernels is compared with."""
    from importlib import metadata

    found: dict[str, str | None] = {}
    for name in ("flash-attn", "flashinfer-python", "xformers", "vllm"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


if __name__ == "__main__":
    raise SystemExit(main())
