"""Dataclasses of options: one definition for the command line, the config file and the code."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

_NEEDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}
_NEEDS_MANY = {str: "names", int: "whole numbers", float: "numbers", Path: "paths"}


@dataclasses.dataclass(frozen=True)
class Argument:
    """One option, described by its field, its type and the class's docstring.

    Attributes
    ----------
    name : str
        The field's name.
    kind : type
        The type of each value: str, int, float, bool or Path.
    choices : tuple of str
        The allowed values, if the field's type is a ``Literal``.
    many : bool
        Whether the option takes several values, as a tuple.
    default : object
        ``dataclasses.MISSING`` if a value is required.
    help : str
    formerly : str, optional
        An old name that the command line and files may still use.
    """

    name: str
    kind: type
    choices: tuple[str, ...]
    many: bool
    default: Any
    help: str
    formerly: str | None = None

    @property
    def flag(self) -> str:
        """The option's spelling on the command line, such as ``--step-tokens``."""
        return self.flags[0]

    @property
    def flags(self) -> tuple[str, ...]:
        """All spellings on the command line, the old name last."""
        return tuple("--" + name.replace("_", "-") for name in (self.name, self.formerly) if name)

    @property
    def required(self) -> bool:
        """Whether a value is required."""
        return self.default is dataclasses.MISSING

    @property
    def by_commas(self) -> bool:
        """Whether commas separate several values on the command line; a required option is repeated instead."""
        return self.many and not self.required

    def split(self, text: str) -> tuple[Any, ...]:
        """Split a comma-separated value of the command line.

        Raises
        ------
        ValueError
            If a value is not of the option's type.

        Examples
        --------
        >>> Argument("contexts", int, (), True, (8,), "").split("128,256")
        (128, 256)
        """
        try:
            return tuple(self.kind(part.strip()) for part in text.split(",") if part.strip())
        except ValueError:
            raise ValueError(f"{self.flag}: got {text!r}, needs {_NEEDS_MANY[self.kind]} separated by commas") from None

    def checked(self, value: Any) -> Any:
        """Convert a value to the option's type: a string to a path, a list to a tuple, an int to a float.

        Raises
        ------
        ValueError
            If it has another type, or is not among the choices.
        """
        if value is None and self.default is None:
            return None
        if not self.many:
            return self._checked(value, _NEEDS[self.kind])
        needs = f"a list of {_NEEDS_MANY[self.kind]}"
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ValueError(f"{self.name}: got {value!r}, needs {needs}")
        return tuple(self._checked(one, needs) for one in value)

    def _checked(self, value: Any, needs: str) -> Any:
        if self.kind is Path and isinstance(value, (str, os.PathLike)):
            return Path(value)
        if self.kind is float and type(value) is int:
            return float(value)
        if not isinstance(value, self.kind) or (isinstance(value, bool) and self.kind is not bool):
            raise ValueError(f"{self.name}: got {value!r}, needs {needs}")
        if self.choices and value not in self.choices:
            raise ValueError(f"{self.name}: got {value!r}, needs one of {', '.join(self.choices)}")
        return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Base class of a command's options, which checks values against the types of their fields."""

    def __post_init__(self) -> None:
        for argument in arguments(type(self)):
            object.__setattr__(self, argument.name, argument.checked(getattr(self, argument.name)))

    def require(self, names: str, fits: Callable[[Any], bool], needs: str) -> None:
        """Require that options fulfil a condition. None, for an option that isn't given, always does.

        Raises
        ------
        ValueError
            If an option doesn't. The message has its name, its value and what it needs.
        """
        for name in names.split():
            value = getattr(self, name)
            if value is not None and not fits(value):
                raise ValueError(f"{name}: got {value!r}, needs {needs}")


T = TypeVar("T", bound=Options)


def arguments(options: type[Options]) -> tuple[Argument, ...]:
    """Return the arguments that a dataclass of options defines, required ones first.

    Examples
    --------
    >>> from refrag.training.distill.options import DistillOptions
    >>> {argument.name: argument.help for argument in arguments(DistillOptions)}["k"]
    'Tokens per chunk.'
    """
    hints = typing.get_type_hints(options)
    texts: dict[str, str] = {}
    for base in reversed(options.__mro__):
        texts |= _texts(base.__dict__.get("__doc__") or "")
    found = []
    for field in dataclasses.fields(options):
        kind, choices, many = _kind(hints[field.name])
        formerly = field.metadata.get("formerly")
        found.append(Argument(field.name, kind, choices, many, field.default, texts[field.name], formerly))
    return tuple(sorted(found, key=lambda argument: not argument.required))


def from_command_line(options: type[T], values: Mapping[str, Any]) -> T:
    """Build options from the values of a command line, splitting values that contain commas."""
    values = dict(values)
    for argument in arguments(options):
        if argument.by_commas and isinstance(values.get(argument.name), str):
            values[argument.name] = argument.split(values[argument.name])
    return options(**values)


def _kind(hint: Any) -> tuple[type, tuple[str, ...], bool]:
    """Return the type of a field's values, their choices, and whether it takes several."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (kind for kind in typing.get_args(hint) if kind is not type(None))
    if typing.get_origin(hint) is Literal:
        return str, typing.get_args(hint), False
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], (), True
    return hint, (), False


def _texts(doc: str) -> dict[str, str]:
    """Return the description of each attribute in a NumPy docstring; several attributes may share one."""
    texts = {}
    for names, body in re.findall(r"^(\w[\w, ]*) : .*\n?((?:    .*\n?)*)", inspect.cleandoc(doc), re.MULTILINE):
        text = " ".join(body.split()).replace("``", "")
        texts.update({name.strip(): text for name in names.split(",")})
    return texts
