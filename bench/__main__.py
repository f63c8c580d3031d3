"""The command line of the benchmarks."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from bench import attention, rows
from bench.case import Case
from bench.run import OURS, Outcome, measure
from refrag_kernels import backends

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def bench() -> None:
    """Benchmarks of refrag_kernels against its peers."""


def cases(flex: bool) -> Iterator[Case]:
    yield from attention.passage_cases(flex)
    yield from attention.causal_cases()
    yield from attention.encoder_cases()
    yield from attention.backward_cases()
    yield from rows.paged_cases()
    yield from rows.projection_cases()
    yield from attention.plan_cases()


def figures(outcome: Outcome) -> dict:
    case = outcome.case
    return {
        "op": case.op,
        "case": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "seconds": {
            name: {"median": t.median, "p20": t.quantile(0.2), "p80": t.quantile(0.8), "min": t.least}
            for name, t in outcome.times.items()
        },
        "wrong": outcome.wrong,
        "speed_up": outcome.speed_up(),
        "share_of_limit": outcome.share(),
        "useful_gflops": case.flops / outcome.times[OURS].median / 1e9
        if case.flops and OURS in outcome.times
        else None,
        "matmul_gflops": outcome.matmul / 1e9 if outcome.matmul else None,
        "read_gbytes": outcome.bandwidth / 1e9 if outcome.bandwidth else None,
        "cpu_pressure": outcome.pressure,
        "misses": outcome.misses(),
    }


def line(outcome: Outcome) -> str:
    case, times = outcome.case, outcome.times
    parts = [f"{case.op}, {case.name}, {str(case.dtype).removeprefix('torch.')}"]
    if OURS in times:
        parts.append(f"{times[OURS].median * 1e3:.2f} ms (min {times[OURS].least * 1e3:.2f})")
    if outcome.best_peer:
        peer = times[outcome.best_peer]
        parts.append(f"best peer {outcome.best_peer} {peer.median * 1e3:.2f} ms (min {peer.least * 1e3:.2f})")
    if outcome.speed_up():
        parts.append(f"{outcome.speed_up():.2f} x")
    if outcome.share():
        parts.append(f"{100 * outcome.share():.0f} % of the {'read' if case.bytes else 'matmul'} rate")
    parts += [f"WRONG: {name}, error {error:.1e}" for name, error in outcome.wrong.items()]
    parts += [f"missed {miss}" for miss in outcome.misses()]
    return parts[0] + ": " + "; ".join(parts[1:])


@app.command()
def run(
    only: Annotated[str, typer.Option(help="Run cases whose op, name or dtype holds this text.")] = "",
    rounds: Annotated[int, typer.Option(help="Rounds that count, after two that don't.")] = 11,
    threads: Annotated[int, typer.Option(help="Threads; 0 leaves torch's choice.")] = 2,
    flex: Annotated[bool, typer.Option(help="Compile flex_attention as a peer: half a minute a shape.")] = True,
    output: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Check every contender against float64 and time them in turns; exit code 1 if a result of ours is wrong."""
    console = Console()
    if threads:
        torch.set_num_threads(threads)
    console.print(str(backends.report()), highlight=False, soft_wrap=True)
    done = []
    for case in cases(flex):
        if only and only not in f"{case.op} {case.name} {case.dtype}":
            continue
        with console.status(f"{case.op}, {case.name}"):
            outcome = measure(case, rounds)
        done.append(figures(outcome))
        console.print(line(outcome), highlight=False, soft_wrap=True)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            machine = {
                "processor": platform.processor(),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
            }
            output.write_text(json.dumps({"machine": machine, "rounds": rounds, "cases": done}, indent=2) + "\n")
    if any(OURS in figures["wrong"] for figures in done):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
