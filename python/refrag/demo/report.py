"""Prints the demo's results: both answers side by side, and one table."""

from __future__ import annotations

from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from refrag.demo.caution import caution
from refrag.demo.demo import CACHED, FULL, READINGS, Answered, DemoSettings, Models


def print_answers(console: Console, settings: DemoSettings, answered: Answered, models: Models) -> None:
    """Print the question, the context, and both answers side by side."""
    compressed = answered.compressed
    total, expanded = len(compressed.chunks), len(compressed.expanded)
    shown = ", ".join(answered.passages[:6]) + (", ..." if len(answered.passages) > 6 else "")
    console.print(f"\n[bold]Question[/bold]  {settings.question}", highlight=False)
    console.print(
        f"[bold]Context[/bold]   {len(answered.passages)} passages ({shown}), {total} chunks of {settings.k} tokens"
        + (f", {expanded} of them expanded" if expanded else ""),
        highlight=False,
    )
    width = (console.width - 1) // 2
    panels = []
    for name, title in ((FULL, "from the full text"), (CACHED, "from compressed chunks")):
        rows = answered.readings[name].rows
        text = str(models.tokenizer.decode(answered.continuations[name].token_ids, skip_special_tokens=True)).strip()
        panels.append(Panel(text or "(nothing)", title=f"{title}: {rows:,} rows", width=width))
    console.print(Columns(panels, padding=(0, 0)), markup=False)
    console.print(caution(None, models.processor.k) or "", highlight=False)


def print_table(console: Console, settings: DemoSettings, answered: Answered) -> None:
    """Print the rows, times and sizes of every reading."""
    rounds = len(answered.readings[FULL].seconds)
    table = Table(
        title=f"{answered.readings[FULL].rows:,} tokens of context, k = {settings.k}, float32, "
        f"median of {rounds} round{'s' if rounds > 1 else ''}",
        title_justify="left",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),  # narrow enough for 80 columns
        show_edge=False,
    )
    table.add_column("", no_wrap=True)
    for heading in ("rows", "first token", "speed-up", "per token", "KV cache"):
        table.add_column(heading, justify="right", no_wrap=True)
    full = answered.readings[FULL].first_token
    for name, reading in answered.readings.items():
        continuation = answered.continuations[name]
        table.add_row(
            READINGS[name],
            f"{reading.rows:,}",
            f"{reading.first_token * 1e3:,.0f} ms",
            f"{full / reading.first_token:.1f} x",
            f"{continuation.seconds_per_token * 1e3:.0f} ms",
            f"{continuation.kv_bytes / 2**20:,.1f} MiB",
        )
    console.print()
    console.print(table)
    if (answered.cpu_pressure or 0) > 0.25:
        console.print(
            f"[yellow]Other programs kept this machine's CPUs busy (some process waited for one during "
            f"{answered.cpu_pressure:.0%} of the time): don't trust these times.[/yellow]",
            highlight=False,
        )
