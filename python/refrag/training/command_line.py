"""An argparse command line for a dataclass of options, for use without typer and rich."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refrag.training.arguments import T, arguments, from_command_line
from refrag.training.config_files import CONFIG_HELP, read_config


def parse(options: type[T], program: str, given: Sequence[str] | None = None) -> T:
    """Parse a command line into options, without the packages that the ``refrag`` command needs.

    Raises
    ------
    SystemExit
        If an argument is unknown or missing.
    ValueError
        If a value is invalid.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path, help=CONFIG_HELP)
    config = first.parse_known_args(given)[0].config
    values = {} if config is None else read_config(config, options)
    parser = argparse.ArgumentParser(
        program, description=inspect.getdoc(options), parents=[first], argument_default=argparse.SUPPRESS
    )  # fmt: skip
    for argument in arguments(options):
        kwargs: dict[str, Any] = {"type": argument.kind, "help": argument.help}
        if argument.kind is bool:
            kwargs = {"action": argparse.BooleanOptionalAction, "help": argument.help}
        elif argument.by_commas:
            kwargs["type"] = str
        elif argument.many:
            kwargs |= {"nargs": "+", "action": "extend"}
        parser.add_argument(*argument.flags, required=argument.required and argument.name not in values, **kwargs)
    values |= vars(parser.parse_args(given))
    del values["config"]
    return from_command_line(options, values)
