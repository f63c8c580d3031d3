"""`refrag train distill`: train by distillation from the decoder that reads the full text."""

from __future__ import annotations

from rich.console import Console

from refrag.commands.option_commands import option_command
from refrag.commands.train import say_written
from refrag.training.distill.options import DistillOptions


@option_command(DistillOptions)
def distill(options: DistillOptions, console: Console) -> None:
    """Train by distillation instead: the model reads slots, and the decoder on the full text is its teacher.

    The encoder consists of the decoder's first layers. Training runs for a number of steps or minutes. An interrupted
    run resumes when it is started again with the same options.
    """
    from refrag.training.distill.loop import distill as run

    run(options)
    say_written(console, options.output)
