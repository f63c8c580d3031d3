"""Every command keeps the options recorded in command_options.json: spelling, type and default."""

import inspect
import json
import types
import typing
from pathlib import Path

import pytest
import typer
from refrag.cli import app

RECORDED = json.loads(Path(__file__).with_name("command_options.json").read_text())


def commands(command, name):
    for own, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{name} {own}")
    if not hasattr(command, "commands"):
        yield name, command


COMMANDS = dict(commands(typer.main.get_command(app), "refrag"))


def type_of(annotation):
    """Return the name of a value's type, followed by "..." if several values are allowed."""
    if typing.get_origin(annotation) in (typing.Annotated, typing.Union, types.UnionType):
        annotation = next(kind for kind in typing.get_args(annotation) if kind is not type(None))
        return type_of(annotation)
    if typing.get_origin(annotation) is list:
        return typing.get_args(annotation)[0].__name__ + "..."
    return annotation.__name__


def options(command):
    """Return the type and default of each option by spelling, and of each argument by name."""
    function = inspect.unwrap(command.callback)
    hints = {} if hasattr(function, "__signature__") else typing.get_type_hints(function, include_extras=True)
    parameters, found = inspect.signature(function).parameters, {}
    for option in command.params:
        if option.name == "help":
            continue
        parameter = parameters[option.name]
        default = parameter.default
        if default is inspect.Parameter.empty:
            default = "required"
        elif isinstance(default, Path):
            default = str(default)
        for flag in (*option.opts, *option.secondary_opts):
            found[flag] = [type_of(hints.get(option.name, parameter.annotation)), default]
    return found


@pytest.mark.parametrize("name", RECORDED)
def test_options_stay(name):
    found = options(COMMANDS[name])
    assert {flag: found.get(flag) for flag in RECORDED[name]} == RECORDED[name]
