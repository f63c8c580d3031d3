"""Progress and errors of the commands on the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text


def say(console: Console, step: str) -> None:
    """Print a line that says what the command is doing."""
    console.print(f"[dim]{step} ...[/dim]", highlight=False)


def track(console: Console, items: Sequence[Any], what: str) -> Iterable[Any]:
    """Yield ``items`` with a progress bar, or, without a terminal, after one line that describes the step."""
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
    """Print errors that the user can fix as one line and exit with code 2; other errors keep their traceback."""
    from refrag.cache import CacheError

    try:
        yield
    except (ValueError, CacheError, OSError) as error:
        # No markup: a message may contain brackets.
        Console(stderr=True).print(Text.assemble(("refrag:", "red"), f" {error}"), soft_wrap=True)
        raise typer.Exit(2) from None
