"""What only a GPU can tell, in blocks of seconds: ``bench/gpu_report.sh`` runs this.

A block that fails, or that is ended because its time is over, is recorded, and the next one runs. The report is written
again after each block, so that a run that is stopped leaves what it has.
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
_REHEARSAL = 300.0  # seconds that a block has on the CPU, which others may use too
_ON_CPU = {"TRITON_INTERPRET": "1", "REFRAG_GPU_TESTS": "cpu", "OMP_NUM_THREADS": "1"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the blocks, write the report, and return 1 if one of them failed."""
    parser = argparse.ArgumentParser("bench/gpu_report.sh", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu-report"), help="folder; default gpu-report")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME[=SECONDS]", help="these blocks, in this order; --list names them"
    )
    parser.add_argument("--seconds", type=float, help="what blocks share that have no seconds of their own")
    parser.add_argument("--list", action="store_true", help="name the blocks and run nothing")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU: tiny shapes, Triton's interpreter")
    parser.add_argument(
        "--triton-cache", type=Path, metavar="FILE", help="a cache packed by bench.gpu_report.triton_cache"
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
        old.unlink()  # of an earlier run: it would be read as this one's
    environment = dict(_ON_CPU if options.dry_run else {})
    if options.triton_cache:
        environment["TRITON_CACHE_DIR"] = str(triton_cache.unpack(options.triton_cache, folder / "triton-cache"))
    report = run(chosen, folder, environment, options.dry_run)
    print(f"==> {report['verdict']}; wrote report.md, report.json, report.csv and results.jsonl to {options.output}")
    return 0 if report["verdict"] == "ok" else 1


def listing(blocks: Sequence[Block]) -> list[str]:
    """Return a line for each block: its name, its seconds or that it is absent, what it decides; and the sum."""
    lines = [
        f"{block.name:<14} {'absent' if block.absent else f'{block.seconds:.0f} s':>6}  {block.decides}"
        for block in blocks
    ]
    total = sum(block.seconds for block in blocks if not block.absent)
    return [*lines, f"{'in all':<14} {total:>4.0f} s"]


def run(blocks: Sequence[Block], folder: Path, environment: dict[str, str], dry_run: bool) -> dict[str, Any]:
    """Run blocks one after another, each whatever became of those before, and return the report."""
    start, outcomes = time.monotonic(), []
    for block in blocks:
        limit = max(block.seconds, _REHEARSAL) if dry_run else block.seconds
        print(f"==> {block.name}: {'absent' if block.absent else f'up to {limit:.0f} s'}", flush=True)
        words = runner.command(block, "cpu" if dry_run else "cuda", folder / f"{block.name}.jsonl")
        limited = Block(block.name, limit, block.decides)
        outcomes.append(outcome := runner.run(limited, words, folder / f"{block.name}.log", ROOT, environment))
        print(f"    {outcome.status} after {outcome.seconds:.0f} s {outcome.reason}".rstrip(), flush=True)
        report = collect(folder, outcomes, dry_run, time.monotonic() - start)
        write(folder, report)
    return report


def collect(folder: Path, outcomes: Sequence[runner.Outcome], dry_run: bool, seconds: float) -> dict[str, Any]:
    """Put together what the blocks left behind, which is little where they failed."""
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
    """Return the results of a block; the last line of one that was ended may be cut short."""
    if not path.exists():
        return []
    found = []
    for text in path.read_text().splitlines():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return found
