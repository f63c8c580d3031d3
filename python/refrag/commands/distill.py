"""`refrag train distill`: slots that hold their chunks' meaning."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from refrag.console import clear_errors
from refrag.training.distill.arguments import Argument, arguments, numbers


def distill(**given: Any) -> None:
    """Another recipe: make slots hold their chunks' meaning, taught by the decoder that reads the text itself.

    The encoder is made of the decoder's first layers. Runs for a number of steps, or for minutes by the clock. A run
    that was broken off goes on when it is started again with the same options.
    """
    console = Console()
    with clear_errors(console):
        from refrag.training.distill.loop import distill as run
        from refrag.training.distill.options import DistillOptions

        values = {
            argument.name: _value(argument, given[argument.name]) for argument in arguments()
        }  # fmt: skip
        if values["decoder"] is None:
            from refrag import weights

            values["decoder"] = weights.decoder_folder()
        options = DistillOptions(**values)
        run(options)
        console.print(f"Wrote {options.output}/adapter.safetensors and log.jsonl", highlight=False, soft_wrap=True)


def _value(argument: Argument, value: Any) -> Any:
    if not argument.many:
        return value
    if argument.type is Path:
        return tuple(value)
    try:
        return numbers(value)
    except ValueError as error:
        raise ValueError(f"{argument.flag}: {error}") from None


def _parameter(argument: Argument) -> inspect.Parameter:
    """Return the parameter that typer makes an option of."""
    kind, default = argument.type, argument.default
    if argument.many and kind is Path:
        kind = list[Path]  # type: ignore[assignment]
    elif argument.many:
        kind, default = str, ",".join(map(str, default))
    elif argument.name == "decoder":
        kind, default = Path | None, None  # type: ignore[assignment]
    elif default is None:
        kind = kind | None  # type: ignore[assignment]
    if default is dataclasses.MISSING:
        default = inspect.Parameter.empty
    flags = [f"{argument.flag}/--no-{argument.flag[2:]}"] if kind is bool else [argument.flag]
    option = typer.Option(*flags, help=argument.help, show_default=default not in (None, inspect.Parameter.empty))
    return inspect.Parameter(
        argument.name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, option], default=default
    )


distill.__signature__ = inspect.Signature([_parameter(argument) for argument in arguments()])  # type: ignore[attr-defined]
