"""`refrag train distill`: slots that hold their chunks' meaning."""

from __future__ import annotations

from rich.console import Console

from refrag.commands.option_commands import option_command
from refrag.commands.train import say_written
from refrag.training.distill.options import DistillOptions


@option_command(DistillOptions)
def distill(options: DistillOptions, console: Console) -> None:
    """Another recipe: make slots hold their chunks' meaning, taught by the decoder that reads the text itself.

    The encoder is made of the decoder's first layers. Runs for a number of steps, or for minutes by the clock. A run
    that was broken off goes on when it is started again with the same options.
    """
    from refrag.training.distill.loop import distill as run

    run(options)
    say_written(console, options.output)
