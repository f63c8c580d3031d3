"""Old names of modules, classes and keywords, which still work for one release with a DeprecationWarning.

Pickles and ``torch.save`` files, which refer to modules by name, load under the old names as well.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from types import FrameType, ModuleType
from typing import Any, ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# Package -> modules that moved into it under their own names, from the top level of refrag.
_ROOMS = {
    "data": "chunking passage_files sources",
    "demo": "caution html_report inspection pictures plot report streaming timing",
    "encoding": "encode_job passage_encoder ray_engine",
    "model": "acceptance attention config encoder feed_forward generation inference_linear key_rotation "
    "masked_attention merged packing passage_cache policy prefill_graph projector state token_encoder token_scale",
    "processing": "chat expansion processor",
    "store": "key_index shard store_state",
}
_MODULES = {
    **{module: f"{room}.{module}" for room, modules in _ROOMS.items() for module in modules.split()},
    **{
        f"data.{module}": f"corpus.{module}"
        for module in "budget build cleaning debian dictionaries glossary manual_options questions texts "
        "tokenizing".split()
    },
    "choosers": "processing.selectors",
    "prompt": "model.inputs",
    "recipe": "store.fingerprint",
    "training.curriculum": "training.schedules",
    "training.documents": "data.documents",
    "training.expansion": "training.policy_gradient",
    "training.parts": "bundle",
    "training.recipe": "training.stages",
}
# Old name, qualified by its module (by the new name of a module that moved) -> new name.
_SELECTORS = {
    f"{kind}Chooser": f"refrag.processing.selectors.{kind}Selector"
    for kind in ("", "Cosine", "Perplexity", "Policy", "Random", "Threshold")
}
_NAMES = {
    **{f"{module}.{old}": new for old, new in _SELECTORS.items() for module in ("refrag", "processing.selectors")},
    "refrag.ChunkRecipe": "refrag.store.fingerprint.Fingerprint",
    "store.fingerprint.ChunkRecipe": "refrag.store.fingerprint.Fingerprint",
    "adapters.Trained": "refrag.adapters.TrainableSpec",
    "bundle.Parts": "refrag.bundle.ModelBundle",
    "demo.timing.Track": "refrag.retrieval.retriever.Progress",
}


def moved(package: str, module: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package that has the name of a former module, now called ``module``."""

    def find(name: str) -> Any:
        # Importing a submodule of the package looks it up here first.
        if name.startswith("__") or importlib.util.find_spec(f"{package}.{name}") is not None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = _find(module, name, package)
        _warn(f"{package}.{name}", f"{module}.{name}")
        return value

    return find


def renamed(module: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module in which some names have changed."""
    return lambda name: _find(module, name, module)


def renamed_keyword(old: str, new: str) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Return a decorator that accepts the keyword ``old`` in place of ``new``, with a warning."""

    def decorate(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        @functools.wraps(function)
        def call(*args: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
            if old in options:
                if new in options:
                    raise TypeError(f"{old}: got it together with {new}, which replaces it; pass {new} alone")
                _warn(f"{function.__qualname__}({old}=)", f"{function.__qualname__}({new}=)")
                options[new] = options.pop(old)
            return function(*args, **options)

        return call

    return decorate


def renamed_attribute(old: str, new: str) -> property:
    """Return a property that reads the attribute ``new`` under its former name, with a warning."""

    def read(self: Any) -> Any:
        owner = type(self).__name__
        _warn(f"{owner}.{old}", f"{owner}.{new}")
        return getattr(self, new)

    return property(read, doc=f"Former name of ``{new}``.")


def warn_renamed_key(old: str, new: str) -> None:
    """Warn that a key of a request was given under its former name."""
    _warn(repr(old), repr(new))


def _find(module: str, name: str, asked: str) -> Any:
    new = _NAMES.get(f"{module.removeprefix('refrag.')}.{name}")
    if new is not None:
        _warn(f"{asked}.{name}", new)
        module, _, name = new.rpartition(".")
    elif module == asked:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def _warn(old: str, new: str) -> None:
    # Warn at the line that used the name; warnings itself skips the frames of importlib when it counts.
    frame: FrameType | None = sys._getframe()
    level = 1
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("refrag", "importlib"):
            break
        level += package == "refrag"
        frame = frame.f_back
    text = f"{old} is deprecated and will be removed in the next release; use {new} instead"
    warnings.warn(text, DeprecationWarning, stacklevel=level)


class _OldModule(ModuleType):
    """A module under its old name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return _find(f"refrag.{_MODULES[self.__name__.removeprefix('refrag.')]}", name, self.__name__)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules under their old names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, module = fullname.partition(".")
        known = package == "refrag" and module in _MODULES
        return importlib.machinery.ModuleSpec(fullname, self) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _OldModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        new = f"refrag.{_MODULES[module.__name__.removeprefix('refrag.')]}"
        _warn(module.__name__, new)
        importlib.import_module(new)  # so that an error of the new module is raised by the import of the old name


def install() -> None:
    """Make modules importable under their old names."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # ahead of files that an earlier installation may have left behind
