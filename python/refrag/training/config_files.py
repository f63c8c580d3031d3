"""Reads options from TOML, YAML or JSON files, in which they have the same names as on the command line."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refrag import deprecated
from refrag.file_modes import write_whole
from refrag.training.arguments import Options, arguments

CONFIG_HELP = "TOML, YAML or JSON file of options, such as a run's options.toml; the command line overrides it."
CONFIG_NAME = "options.toml"


def read_config(path: str | os.PathLike[str], options: type[Options]) -> dict[str, Any]:
    """Read a file of options.

    Parameters
    ----------
    path : path
        A .toml, .yaml, .yml or .json file: ``learning_rate = 2e-4``, ``data = ["texts/"]``. It may also be the
        ``stage.json`` that earlier versions wrote next to an adapter.
    options : type
        The dataclass whose fields the file may set.

    Returns
    -------
    dict of str to object
        Values by field name.

    Raises
    ------
    ValueError
        If the file can't be read, or has an unknown option or a value of the wrong type. The message names the file and
        option.
    """
    path = Path(path)
    read = _READERS.get(path.suffix)
    if read is None:
        raise ValueError(f"{path}: needs one of the suffixes {', '.join(_READERS)}")
    try:
        values = read(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: can't be read as {path.suffix[1:].upper()} ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got {values!r:.60}, needs options by name")
    known = {argument.name: argument for argument in arguments(options)}
    former = {argument.formerly: argument.name for argument in known.values()}
    if "objective" in values:
        values = _options_of_stage(values, path, options)
    values = {former.get(name, name): value for name, value in values.items()}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(sorted(known))}"
            raise ValueError(f"{path}: got {name}, which isn't an option of this command; {hint}")
    try:
        return {name: known[name].checked(value) for name, value in values.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@deprecated.renamed_keyword("output", "folder")
def write_config(options: Options, folder: str | os.PathLike[str]) -> None:
    """Write all options that are not None to ``options.toml`` in a folder, so that ``--config`` can repeat the run."""
    values = {argument.name: getattr(options, argument.name) for argument in arguments(type(options))}
    lines = [f"{name} = {_toml(value)}\n" for name, value in values.items() if value is not None]
    write_whole(Path(folder) / CONFIG_NAME, "".join(lines).encode())


def _options_of_stage(values: dict[str, Any], path: Path, options: type[Options]) -> dict[str, Any]:
    """Return the options in a ``stage.json``, which nests some of them and has the same fields for every stage."""
    objective = getattr(options, "objective", None)
    if values["objective"] != objective:
        raise ValueError(f"{path}: was written by stage {values['objective']}, needs one of stage {objective}")
    trained = {"train_encoder": "encoder", "train_decoder": "decoder", "rank": "rank"}
    flat = {**values, **values.get("settings", {})}
    flat |= {name: values["trained"][key] for name, key in trained.items() if key in values.get("trained", {})}
    return {field.name: flat[field.name] for field in dataclasses.fields(options) if field.name in flat}


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float):
        return repr(value)  # JSON has no inf
    return json.dumps(value, default=os.fspath, ensure_ascii=False)


def _read_toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError:
            raise ValueError("Python 3.10 needs the package tomli for it, or YAML instead") from None
    return tomllib.loads(text)


def _read_yaml(text: str) -> Any:
    try:
        import yaml  # comes with transformers
    except ImportError:
        raise ValueError("needs the package PyYAML, or TOML instead") from None

    class Loader(yaml.SafeLoader):
        """Resolves scalars as YAML 1.2 does: YAML 1.1 reads a plain no as false, and 2e-4 as a string."""

    redefined = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag not in redefined]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(redefined[0], re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
    number = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
    Loader.add_implicit_resolver(redefined[1], number, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader) or {}
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


_READERS: dict[str, Callable[[str], Any]] = {
    ".toml": _read_toml,
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    ".json": json.loads,
}
