"""The command line of the benchmarks: ``python -m bench run | compare | plot | report``."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.cases import table
from bench.cases.ops import OPS
from bench.cases.presets import PRESETS
from bench.engine import results
from bench.engine.case import Entry, Sweep
from bench.engine.compare import compare, percentage
from bench.engine.run import OURS, Outcome, measure, threads, unmeasured
from refrag_kernels import backends


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.command(options)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bench", description="Benchmarks of refrag_kernels against its peers.")
    commands = parser.add_subparsers(required=True)

    run = commands.add_parser(
        "run",
        help="check every contender against float64 and time them round-robin",
        description="Check every contender against float64 and time them round-robin. Without a sweep option "
        "(--preset to --expand) it measures the published set. Exits with 1 if a refrag_kernels result is wrong.",
    )
    run.set_defaults(command=_run)
    run.add_argument("--op", nargs="+", choices=OPS, metavar="OP", help=f"any of {', '.join(OPS)}")
    run.add_argument(
        "--case",
        nargs="+",
        help="for example prompt, passages, encoder, backward, decode; these run only when named: causal, documents, "
        "blocks, interleaved, random_passages, batch",
    )
    run.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains this text")
    run.add_argument(
        "--backend", nargs="+", default=[], choices=list(backends.missing()), help="time refrag_kernels on each"
    )
    run.add_argument(
        "--preset", nargs="+", choices=list(PRESETS), help=f"any of {', '.join(PRESETS)}", metavar="PRESET"
    )
    run.add_argument("--k", nargs="+", type=int, help="tokens per chunk")
    run.add_argument("--context", nargs="+", type=int, help="tokens in the context")
    run.add_argument("--density", nargs="+", type=float, help="fractions of row pairs that are allowed, up to 1")
    run.add_argument("--expand", nargs="+", type=float, help="fractions of chunks left as text, 0 to 1")
    run.add_argument("--batch", nargs="+", type=int, help="sequences in a decode step")
    run.add_argument("--table", nargs="+", type=int, help="keys that a page table can hold; 0: as many as exist")
    run.add_argument("--dtype", nargs="+", choices=list(table.DTYPES), help="default float32 and bfloat16")
    run.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="device of the tensors")
    run.add_argument("--copies", type=int, help="sets of tensors that calls rotate through; default 1, on a GPU 3")
    run.add_argument("--budget", type=float, metavar="SECONDS", help="skip rows that would start later than this")
    run.add_argument("--rounds", type=int, default=11, help="timed rounds, after two warm-up rounds")
    run.add_argument("--threads", type=int, default=2, help="0 keeps torch's default")
    run.add_argument("--refcheck", action=argparse.BooleanOptionalAction, default=True, help="compare with float64")
    run.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    run.add_argument("--flex", action=argparse.BooleanOptionalAction, default=True, help="also compile flex_attention")
    run.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="also time the peers")
    run.add_argument("--json", "--output", type=Path, dest="json", metavar="FILE", help="write the results as JSON")
    run.add_argument("--csv", type=Path, metavar="FILE", help="write the results as CSV")
    run.add_argument("--markdown", type=Path, metavar="FILE", help="write the results as Markdown tables")
    run.add_argument("--repro", action="store_true", help="print the command of each row")
    run.add_argument("--list", action="store_true", help="list the rows without measuring them")

    two = commands.add_parser("compare", help="compare two runs")
    two.set_defaults(command=_compare)
    two.add_argument("old", type=Path)
    two.add_argument("new", type=Path)
    two.add_argument("--fail-over", metavar="10%", help="exit with 1 if a refrag_kernels median grew by more")

    draw = commands.add_parser("plot", help="plot a run as PNG files")
    draw.set_defaults(command=_plot)
    draw.add_argument("run", type=Path)
    draw.add_argument("--output", type=Path, default=Path("bench-plots"), help="folder; default bench-plots")

    report = commands.add_parser("report", help="print a run as Markdown tables")
    report.set_defaults(command=_report)
    report.add_argument("run", type=Path)
    report.add_argument("--output", type=Path, help="write them to this file instead")
    return parser


def _selected(options: argparse.Namespace) -> list[Entry]:
    """Return the rows selected by the options."""
    for name, least, most in (("k", 1, None), ("context", 1, None), ("density", 0, 1), ("expand", 0, 1)):
        for value in getattr(options, name) or []:
            if value < least or (most is not None and value > most) or (name == "density" and value == 0):
                raise ValueError(f"--{name}: got {value:g}, needs {f'{least} to {most}' if most else 'at least 1'}")
    for name, least in (("batch", 1), ("table", 0)):
        if min(getattr(options, name) or [least]) < least:
            raise ValueError(f"--{name}: got {min(getattr(options, name))}, needs {least} or more")
    for name, least in (("rounds", 1), ("threads", 0), ("copies", 1), ("budget", 0)):
        if getattr(options, name) is not None and getattr(options, name) < least:
            raise ValueError(f"--{name}: got {getattr(options, name)}, needs {least} or more")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got cuda, but torch found no CUDA or ROCm device")
    swept = {"presets": options.preset, "k": options.k, "context": options.context, "density": options.density}
    swept |= {name: getattr(options, name) for name in ("expand", "batch", "table")}
    swept = {name: tuple(values) for name, values in swept.items() if values}
    dtypes = tuple(table.DTYPES[name] for name in options.dtype or ())
    if swept or options.device != "cpu" or "float16" in (options.dtype or ()):
        sweep = Sweep(**swept, **({"dtypes": dtypes} if dtypes else {}), device=options.device)
        entries = list(table.entries(sweep, options.flex, options.op or OPS))
    else:
        entries = table.published(options.flex, options.op or OPS)
    chosen = [
        entry
        for entry in entries
        if (entry.case in options.case if options.case else not entry.on_request)
        and (not dtypes or entry.dtype in (*dtypes, torch.int32))
        and options.only in entry.name
    ]
    if not chosen:
        raise ValueError("no row matches these options; `python -m bench run --list` lists the published set")
    return chosen


def _run(options: argparse.Namespace) -> int:
    entries = _selected(options)
    if options.list:
        print("\n".join(entry.name for entry in entries))
        return 0
    command = "python -m bench " + shlex.join(sys.argv[1:])
    about = results.environment(options.threads, options.rounds, command, options.device)
    start = time.monotonic()
    rows: list[dict] = []
    failed = False
    with threads(options.threads):
        print(backends.report(), flush=True)
        for entry in entries:
            outcome = _outcome(entry, options, time.monotonic() - start)
            rows += results.records(outcome)
            failed |= _is_wrong(outcome)
            print(results.text(outcome), flush=True)
            if options.repro:
                print("  " + entry.command + "".join(f" --backend {name}" for name in options.backend), flush=True)
            # Written after each row, so that an interrupted run keeps what it measured.
            if options.json:
                results.write_json(options.json, about, rows)
    run = {"schema": results.SCHEMA, "environment": about, "rows": rows}
    if options.csv:
        results.write_csv(options.csv, rows)
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(results.markdown(run))
    return 1 if failed else 0


def _outcome(entry: Entry, options: argparse.Namespace, elapsed: float) -> Outcome:
    """Measure a row. Report an error in it and continue with the next row."""
    if options.budget is not None and elapsed > options.budget:
        return unmeasured(entry, skipped=f"the {options.budget:g} s of --budget had passed")
    try:
        return measure(
            entry,
            options.rounds,
            backends=options.backend,
            refcheck=options.refcheck,
            memory=options.memory,
            device=options.device,
            goal=table.goal_of(entry),
            with_peers=options.peers,
            copies=options.copies or (1 if options.device == "cpu" else 3),
        )
    except Exception as error:
        traceback.print_exc()
        return unmeasured(entry, failed=error)


def _is_wrong(outcome: Outcome) -> bool:
    return bool(outcome.failed) or any(name.startswith(OURS) for name in outcome.wrong)


def _compare(options: argparse.Namespace) -> int:
    fail_over = None if options.fail_over is None else percentage(options.fail_over)
    lines, failed = compare(results.read(options.old), results.read(options.new), fail_over)
    print("\n".join(lines))
    return 1 if failed and fail_over is not None else 0


def _plot(options: argparse.Namespace) -> int:
    run = results.read(options.run)
    from bench.engine.plot import plot  # matplotlib takes a second to load

    for path in plot(run, options.output):
        print(path)
    return 0


def _report(options: argparse.Namespace) -> int:
    text = results.markdown(results.read(options.run))
    if options.output:
        options.output.write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
