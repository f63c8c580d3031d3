"""Run the examples in refrag's docstrings and check their output."""

import doctest
import importlib
import pkgutil

import pytest
import refrag
import torch

MODULES = [
    pytest.param(name, marks=pytest.mark.integrations if name.startswith("integrations") else ())
    for name in (module.name.removeprefix("refrag.") for module in pkgutil.walk_packages(refrag.__path__, "refrag."))
    if not name.endswith("__main__")
]


# Packages that modules may need but the tests' environment lacks; see make test-vllm and test-integrations.
OPTIONAL = ("vllm", "haystack", "langchain_core", "llama_index")


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    torch.manual_seed(0)
    try:
        module = importlib.import_module(f"refrag.{name}")
    except ImportError as error:
        missing = (error.__cause__ or error).name.partition(".")[0]
        if missing not in OPTIONAL:
            raise
        pytest.skip(f"{missing} is not installed")
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


@pytest.mark.parametrize("name", ["RefragConfig", "RefragForCausalLM", "RefragProcessor"])
def test_what_users_make_has_an_example(name):
    assert ">>>" in getattr(refrag, name).__doc__


def test_exports():
    assert all(getattr(refrag, name).__name__ == name for name in refrag.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        refrag.nothing  # noqa: B018
