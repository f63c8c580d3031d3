"""What the commands write to the terminal beside their results."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text


def say(console: Console, step: str) -> None:
    """Print a line that says what is being done."""
    console.print(f"[dim]{step} ...[/dim]", highlight=False)


def track(console: Console, items: Sequence[Any], what: str) -> Iterable[Any]:
    """Yield ``items`` under a progress bar; where there is no terminal, after a line that says what is done."""
    if not items:
        return
    if not console.is_terminal:
        say(console, what)
        yield from items
        return
    columns = (TextColumn("[dim]{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        yield from progress.track(items, description=what)


@contextlib.contextmanager
def clear_errors(console: Console) -> Iterator[None]:
    """End the program with one line for what the user can put right; anything else keeps its traceback."""
    from refrag.cache import CacheError

    try:
        yield
    except (ValueError, CacheError, OSError) as error:
        # No markup: a message may hold brackets of its own.
        Console(stderr=True).print(Text.assemble(("refrag:", "red"), f" {error}"), soft_wrap=True)
        raise typer.Exit(2) from None
