"""Run the examples in the public packages' docstrings and check their output."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import refrag_kernels


def modules():
    names = [module.name for module in pkgutil.walk_packages(refrag_kernels.__path__, "refrag_kernels.")]
    return [name for name in names if not name.endswith(("._C", "._planner", ".__main__")) and "triton" not in name]


@pytest.mark.parametrize("name", modules())
def test_examples(name):
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", [name for name in refrag_kernels.__all__])
def test_every_public_function_has_an_example(name):
    assert ">>>" in (getattr(refrag_kernels, name).__doc__ or "") or name in ("AttentionPlan", "VisibleRanges")
