"""Everything that only a GPU can tell, in one command of less than 9 minutes: tests first, then benchmarks.

``bench/gpu_report.sh`` runs it. A phase that fails or takes too long is recorded, and the next one runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import results
from bench.gpu_report import phases, tables
from bench.gpu_report.phases import Phase

ROOT = Path(__file__).resolve().parent.parent.parent
_OPS = (
    "mixed_attention",
    "paged_attention",
    "append_kv",
    "merge_states",
    "pool_chunks",
    "project_chunks",
    "embed_mixed",
)
_BACKENDS = ("triton", "cuda")
_PROCESSES = 14  # of the tests: their time goes into compiling, one kernel at a time each


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the phases, write the report, and return 1 if something failed."""
    parser = argparse.ArgumentParser("bench/gpu_report.sh", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu-report"), help="folder; default gpu-report")
    parser.add_argument("--only", nargs="+", metavar="PHASE", help="some of the phases; --list names them")
    parser.add_argument("--seconds", type=float, help="time to share out among the phases; default what --list adds up")
    parser.add_argument("--list", action="store_true", help="name the phases and run nothing")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU: the same phases, tiny shapes")
    options = parser.parse_args(arguments)
    folder = options.output.resolve()
    planned = rehearsal(folder) if options.dry_run else on_gpu(folder)
    if unknown := set(options.only or ()) - {phase.name for phase in planned}:
        parser.error(f"--only: got {', '.join(sorted(unknown))}, needs some of {', '.join(p.name for p in planned)}")
    planned = [phase for phase in planned if phase.name in (options.only or {p.name for p in planned})]
    if options.seconds is not None:
        if options.seconds <= 0:
            parser.error(f"--seconds: got {options.seconds:g}, needs more than 0")
        share = options.seconds / sum(phase.seconds for phase in planned)
        planned = [dataclasses.replace(phase, seconds=phase.seconds * share) for phase in planned]
    if options.list:
        print("\n".join(f"{phase.name:<12} {phase.seconds:3.0f} s" for phase in planned))
        return 0
    for old in folder.glob("*.json*"):
        old.unlink()  # of an earlier run: it would be read as this one's
    start = time.monotonic()
    outcomes = phases.run(planned, folder, ROOT)
    report = collect(folder, outcomes, options.dry_run, time.monotonic() - start)
    write(folder, report)
    print(f"==> {report['verdict']}; wrote report.json, report.csv and report.md to {options.output}")
    return 0 if report["verdict"] == "ok" else 1


def on_gpu(folder: Path) -> list[Phase]:
    """Return the phases on a machine with a GPU; their times add up to 530 s."""
    shards = max(1, min(_PROCESSES, (os.cpu_count() or 1) - 1))
    # The many cases come last: they may be cut short.
    tests = ("tests/test_cuda_kernels.py", "tests/test_pooling_cuda.py", "tests/gpu/test_gpu_ops.py")
    ttft = ("--op", "ttft", "--preset", "llama2-7b", "--no-refcheck", "--no-memory", "--rounds", "2")
    ttft += ("--context", "4096", "16384", "65536")
    bench = functools.partial(_bench, folder, "cuda", "bfloat16")
    return [
        Phase(
            "environment", 20, [_python("bench.machine", "--device", "cuda", "--json", f"{folder}/environment.json")]
        ),
        Phase("sample", 45, [_pytest(folder, "sample", 0, 1, "tests/gpu/test_gpu_sample.py")]),
        Phase("tests", 110, [_pytest(folder, "tests", number, shards, *tests) for number in range(shards)]),
        _sanitizer(folder, 40),
        Phase("ops", 90, [bench("ops", "--op", *_OPS, "--preset", "llama3-8b", "--backend", *_BACKENDS)]),
        # One query head a key; flex_attention, which takes long to compile, has been timed.
        Phase(
            "ops-mha",
            60,
            [bench("ops-mha", "--op", *_OPS, "--preset", "llama2-7b", "--no-flex", "--backend", *_BACKENDS)],
        ),
        Phase("model", 30, [bench("model", "--op", "ttft", "--preset", "llama2-7b-2-layers", "--rounds", "1")]),
        # What reads the full text doesn't depend on k: it is measured once.
        Phase("ttft", 95, [bench("ttft", *ttft, "--k", "16")]),
        Phase("ttft-k", 40, [bench("ttft-k", *ttft, "--no-peers", "--k", "8", "32")]),
    ]


def rehearsal(folder: Path) -> list[Phase]:
    """Return the same phases on the CPU: Triton's interpreter, tiny shapes, a few tests."""
    interpreter = {"TRITON_INTERPRET": "1", "REFRAG_GPU_TESTS": "cpu", "OMP_NUM_THREADS": "1"}
    few = ("tests/gpu/test_gpu_ops.py", "-k", "pool_chunks-triton-float32-0] or merge_states-triton-float32-1]")
    tiny = ("--preset", "tiny", "--context", "256", "--rounds", "1", "--threads", "1", "--no-memory")
    bench = functools.partial(_bench, folder, "cpu", "float32")
    limits = ("--dtype", "float32", "--rounds", "1", "--json", f"{folder}/environment.json")
    return [
        Phase("environment", 100, [_python("bench.machine", *limits)]),
        Phase(
            "sample",
            100,
            [_pytest(folder, "sample", 0, 1, "tests/gpu/test_gpu_sample.py", "-k", "pool_chunks-triton")],
            interpreter,
        ),
        Phase("tests", 100, [_pytest(folder, "tests", number, 2, *few) for number in range(2)], interpreter),
        _sanitizer(folder, 100),
        Phase("ops", 100, [bench("ops", "--op", "pool_chunks", "append_kv", *tiny, "--copies", "2")]),
        Phase("ops-mha", 100, [], skip="the phase before does the same here"),
        Phase("model", 100, [], skip="the next phase does the same here"),
        Phase("ttft", 100, [bench("ttft", "--op", "ttft", *tiny, "--k", "16")]),
        Phase("ttft-k", 100, [bench("ttft-k", "--op", "ttft", *tiny, "--no-peers", "--k", "8", "32")]),
    ]


def _sanitizer(folder: Path, seconds: float) -> Phase:
    tool = shutil.which("compute-sanitizer")
    sample = _pytest(folder, "sanitizer", 0, 1, "tests/gpu/test_gpu_sample.py")
    # Without torch's cache each tensor is an allocation of its own, whose ends are seen.
    return Phase(
        "sanitizer",
        seconds,
        [(tool or "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "99", *sample)],
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        None if tool else "compute-sanitizer is not installed",
    )


def _python(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *arguments)


def _pytest(folder: Path, name: str, number: int, shards: int, *arguments: str) -> tuple[str, ...]:
    record = ("--record", f"{folder}/{name}-{number}.jsonl", "--shard", f"{number}/{shards}")
    plugins = ("-p", "bench.gpu_report.pytest_record", "-p", "no:cacheprovider", "-p", "no:xdist")
    return _python("pytest", "-q", *plugins, *record, *arguments)


def _bench(folder: Path, device: str, dtype: str, name: str, *arguments: str) -> tuple[str, ...]:
    where = ("--device", device, "--dtype", dtype, "--budget", "{limit}", "--json", f"{folder}/{name}.json")
    return _python("bench", "run", *arguments, *where)


def collect(folder: Path, outcomes: Sequence[phases.Outcome], dry_run: bool, seconds: float) -> dict[str, Any]:
    """Put together what the phases left behind, which is little where they failed."""
    environment = _read(folder / "environment.json")
    tests = [test for file in sorted(folder.glob("*.jsonl")) for test in _lines(file)]
    runs = {name: _read(folder / f"{name}.json") for name in ("ops", "ops-mha", "model", "ttft", "ttft-k")}
    rows = [{"phase": name, **row} for name, run in runs.items() if run for row in run["rows"]]
    about = next((run["environment"] for run in runs.values() if run), None)
    bad = [outcome.name for outcome in outcomes if outcome.status in ("failed", "out of time")]
    return {
        "schema": 1,
        "dry_run": dry_run,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": round(seconds, 1),
        "verdict": f"not ok: {', '.join(bad)}" if bad else "ok",
        "commit": results.commit(),
        "environment": environment,
        "phases": [vars(outcome) for outcome in outcomes],
        "tests": tests,
        "benchmark": about,
        "rows": rows,
    }


def write(folder: Path, report: dict[str, Any]) -> None:
    """Write report.json, report.csv with the benchmarks' rows, and report.md."""
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    results.write_csv(folder / "report.csv", report["rows"])
    (folder / "report.md").write_text(tables.markdown(report))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        try:
            yield {"phase": path.stem.rpartition("-")[0], **json.loads(line)}
        except json.JSONDecodeError:  # the last line of a process that was ended
            continue
