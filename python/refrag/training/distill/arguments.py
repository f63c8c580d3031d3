"""The options of distillation as arguments of a command line: their names, types and texts are the dataclass's own."""

from __future__ import annotations

import argparse
import dataclasses
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refrag.training.distill.options import DistillOptions


@dataclasses.dataclass(frozen=True)
class Argument:
    """One option.

    Attributes
    ----------
    name : str
        Of the dataclass's field.
    type : type
        str, int, float, bool or Path, of each value.
    many : bool
        Whether it takes several values, one after another, separated by commas where they are numbers.
    default : object
        ``dataclasses.MISSING`` where it has to be given.
    help : str
    """

    name: str
    type: type
    many: bool
    default: Any
    help: str

    @property
    def flag(self) -> str:
        """As it is written: ``--step-tokens``."""
        return "--" + self.name.replace("_", "-")


def arguments() -> list[Argument]:
    """Return all options.

    Examples
    --------
    >>> {argument.name: argument.help for argument in arguments()}["decoder"]
    'Folder of the decoder.'
    """
    types, texts = typing.get_type_hints(DistillOptions), _texts(DistillOptions.__doc__ or "")
    found = []
    for field in dataclasses.fields(DistillOptions):
        plain = [kind for kind in typing.get_args(types[field.name]) if kind not in (type(None), Ellipsis)]
        many = typing.get_origin(types[field.name]) is tuple
        kind = plain[0] if plain else types[field.name]
        found.append(Argument(field.name, kind, many, field.default, texts[field.name]))
    return found


def parse(given: Sequence[str] | None = None) -> DistillOptions:
    """Return the options of a command line, without the packages that ``refrag`` itself needs.

    Raises
    ------
    SystemExit
        If an argument is unknown or missing.
    ValueError
        If a value doesn't fit.
    """
    parser = argparse.ArgumentParser(
        "python -m refrag.training.distill", description=(DistillOptions.__doc__ or "").splitlines()[0]
    )
    for argument in arguments():
        needed = argument.default is dataclasses.MISSING
        if argument.type is bool:
            parser.add_argument(argument.flag, action=argparse.BooleanOptionalAction, default=argument.default,
                                help=argument.help)  # fmt: skip
        elif argument.many and argument.type is Path:
            parser.add_argument(argument.flag, type=Path, nargs="+", required=True, help=argument.help)
        elif argument.many:
            parser.add_argument(argument.flag, type=numbers, default=argument.default, help=argument.help)
        else:
            parser.add_argument(argument.flag, type=argument.type, required=needed, help=argument.help,
                                default=None if needed else argument.default)  # fmt: skip
    values = vars(parser.parse_args(given))
    fields: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return DistillOptions(**fields)


def numbers(text: str | Sequence[int]) -> tuple[int, ...]:
    """Return whole numbers that are separated by commas.

    Raises
    ------
    ValueError
        If they are something else.

    Examples
    --------
    >>> numbers("128,256")
    (128, 256)
    """
    if not isinstance(text, str):
        return tuple(text)
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"got {text!r}, needs whole numbers separated by commas") from None


def _texts(doc: str) -> dict[str, str]:
    """Return the text of each attribute in a NumPy docstring; several may share one."""
    texts = {}
    for names, body in re.findall(r"^    (\w[\w, ]*) : .*\n((?:        .*\n)*)", doc, re.MULTILINE):
        text = " ".join(body.split()).replace("``", "")
        texts.update({name.strip(): text for name in names.split(",")})
    return texts
