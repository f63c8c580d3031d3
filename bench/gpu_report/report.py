"""Run tests and measurements that need a GPU, in blocks of seconds: the program behind ``bench/gpu_report.sh``.

If a block fails or exceeds its time limit, this is recorded and the next block runs. The report is rewritten after each
block, so that an interrupted run keeps its results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.engine import results
from bench.gpu_report import catalogue, runner, schema, tables, triton_cache
from bench.gpu_report.catalogue import Block

ROOT = Path(__file__).resolve().parent.parent.parent
_DRY_RUN_SECONDS = 300.0  # time limit of a block on the CPU, which may be shared
_ON_CPU = {"TRITON_INTERPRET": "1", "REFRAG_GPU_TESTS": "cpu", "OMP_NUM_THREADS": "1"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the blocks, write the report, and return 1 if one of them failed."""
    parser = argparse.ArgumentParser("bench/gpu_report.sh", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu-report"), help="folder; default gpu-report")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME[=SECONDS]", help="run these blocks in this order; see --list"
    )
    parser.add_argument("--seconds", type=float, help="total for blocks without explicit seconds")
    parser.add_argument("--list", action="store_true", help="list the blocks without running them")
    parser.add_argument("--dry-run", action="store_true", help="run on the CPU: tiny shapes, Triton's interpreter")
    parser.add_argument(
        "--triton-cache", type=Path, metavar="FILE", help="cache packed by bench.gpu_report.triton_cache"
    )
    options = parser.parse_args(arguments)
    try:
        chosen = catalogue.choose(options.only, options.seconds)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        print("\n".join(listing(chosen)))
        return 0
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.jsonl"):
        old.unlink()  # from an earlier run; it would be read as part of this one
    environment = dict(_ON_CPU if options.dry_run else {})
    if options.triton_cache:
        environment["TRITON_CACHE_DIR"] = str(triton_cache.unpack(options.triton_cache, folder / "triton-cache"))
    report = run(chosen, folder, environment, options.dry_run)
    print(f"==> {report['verdict']}; wrote report.md, report.json, report.csv and results.jsonl to {options.output}")
    return 0 if report["verdict"] == "ok" else 1


def listing(blocks: Sequence[Block]) -> list[str]:
    """Return a line per block with its name, its seconds (or "absent") and what it decides, and the total."""
    lines = [
        f"{block.name:<14} {'absent' if block.absent else f'{block.seconds:.0f} s':>6}  {block.decides}"
        for block in blocks
    ]
    total = sum(block.seconds for block in blocks if not block.absent)
    return [*lines, f"{'in all':<14} {total:>4.0f} s"]


def run(blocks: Sequence[Block], folder: Path, environment: dict[str, str], dry_run: bool) -> dict[str, Any]:
    """Run blocks in sequence, regardless of earlier failures, and return the report."""
    start, outcomes = time.monotonic(), []
    for block in blocks:
        limit = max(block.seconds, _DRY_RUN_SECONDS) if dry_run else block.seconds
        print(f"==> {block.name}: {'absent' if block.absent else f'up to {limit:.0f} s'}", flush=True)
        words = runner.command(block, "cpu" if dry_run else "cuda", folder / f"{block.name}.jsonl")
        limited = Block(block.name, limit, block.decides)
        outcomes.append(outcome := runner.run(limited, words, folder / f"{block.name}.log", ROOT, environment))
        print(f"    {outcome.status} after {outcome.seconds:.0f} s {outcome.reason}".rstrip(), flush=True)
        report = collect(folder, outcomes, dry_run, time.monotonic() - start)
        write(folder, report)
    return report


def collect(folder: Path, outcomes: Sequence[runner.Outcome], dry_run: bool, seconds: float) -> dict[str, Any]:
    """Collect the blocks' results, which may be incomplete if they failed."""
    lines: list[dict[str, Any]] = []
    unfit: list[str] = []
    for outcome in outcomes:
        for line in _lines(folder / f"{outcome.name}.jsonl"):
            problems = schema.problems(line)
            unfit += [f"{outcome.name}: {problem}: {json.dumps(line)[:200]}" for problem in problems]
            lines += [line] if not problems else []
    bad = [f"{outcome.name} ({outcome.status})" for outcome in outcomes if outcome.status in ("failed", "out of time")]
    bad += ["results that don't fit the schema"] if unfit else []
    return {
        "schema": 2,
        "dry_run": dry_run,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": round(seconds, 1),
        "verdict": f"not ok: {', '.join(bad)}" if bad else "ok",
        "commit": results.commit(),
        "blocks": [vars(outcome) for outcome in outcomes],
        "results": lines,
        "unfit": unfit,
    }


def write(folder: Path, report: dict[str, Any]) -> None:
    """Write report.json, results.jsonl with every line, report.csv with the benchmarks' rows, and report.md."""
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in report["results"]))
    results.write_csv(folder / "report.csv", tables.rows(report["results"]))
    (folder / "report.md").write_text(tables.markdown(report))


def _lines(path: Path) -> list[Any]:
    """Return the results of a block; the last line may be truncated if the block was stopped."""
    if not path.exists():
        return []
    found = []
    for text in path.read_text().splitlines():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return found
