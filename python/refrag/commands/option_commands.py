"""Commands whose options are the fields of a dataclass, and can also be given in a file."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from refrag.console import clear_errors
from refrag.training.arguments import Argument, T, arguments, from_command_line
from refrag.training.config_files import CONFIG_HELP, read_config


def option_command(options: type[T]) -> Callable[[Callable[[T, Console], None]], Callable[..., None]]:
    """Return a decorator that turns a function of (options, console) into a function for ``app.command()``.

    Parameters
    ----------
    options : type
        A dataclass; each field becomes an option, and ``--config`` reads them from a file.
    """

    def command_of(run: Callable[[T, Console], None]) -> Callable[..., None]:
        def command(ctx: typer.Context, config: Path | None, **values: Any) -> None:
            console = Console()
            with clear_errors(console):
                given = dict(ctx.obj or {})
                for name, value in values.items():
                    source = ctx.get_parameter_source(name)
                    if source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP"):
                        given[name] = value
                run(from_command_line(options, given), console)

        def read(ctx: typer.Context, config: Path | None) -> Path | None:
            if config is not None:
                with clear_errors(Console()):
                    ctx.obj = read_config(config, options)
                # Required options may be missing on the command line if the file has them.
                required = [argument.name for argument in arguments(options) if argument.required]
                ctx.default_map = {name: ctx.obj[name] for name in required if name in ctx.obj}
            return config

        file = typer.Option("--config", callback=read, is_eager=True, help=CONFIG_HELP)
        command.__name__, command.__doc__ = run.__name__, run.__doc__
        command.__signature__ = inspect.Signature([  # type: ignore[attr-defined]
            inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
            *map(_parameter, arguments(options)),
            inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None,
                              annotation=Annotated[Path | None, file]),
        ])  # fmt: skip
        return command

    return command_of


def _parameter(argument: Argument) -> inspect.Parameter:
    """Return a parameter from which typer makes an option."""
    kind, default = argument.kind, argument.default
    if argument.by_commas:
        kind, default = str, ",".join(f"{value:g}" if argument.kind is float else str(value) for value in default)
    elif argument.many:
        kind = list[kind]  # type: ignore[valid-type,assignment]
    elif default is None:
        kind = kind | None  # type: ignore[assignment]
    flags = [f"{flag}/--no-{flag[2:]}" if kind is bool else flag for flag in argument.flags]
    option = typer.Option(*flags, help=argument.help, show_default=default is not None)
    return inspect.Parameter(
        argument.name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, option],
        default=inspect.Parameter.empty if default is dataclasses.MISSING else default,
    )  # fmt: skip
