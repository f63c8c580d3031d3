"""refrag_kernels has no circular imports, including imports inside functions."""

import ast
import graphlib
from pathlib import Path

import pytest

import refrag_kernels

ROOT = Path(refrag_kernels.__file__).parent


def name_of(path):
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


def imports():
    """Return the modules that each module imports, except for type checking."""
    modules = {name_of(path): ast.parse(path.read_text()) for path in ROOT.rglob("*.py")}
    found = {}
    for module, tree in modules.items():
        types = {id(n) for block in ast.walk(tree) if is_for_types(block) for n in ast.walk(block)}
        names = set()
        for node in ast.walk(tree):
            if id(node) in types:
                continue
            if isinstance(node, ast.ImportFrom):
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        names &= set(modules)
        # ``from package import submodule`` imports the submodule, not the package.
        found[module] = {name for name in names if not any(other.startswith(f"{name}.") for other in names)}
    return found


def is_for_types(node):
    return isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING"


def test_there_is_no_circle():
    found = imports()
    assert found["refrag_kernels.registration"] >= {"refrag_kernels.selection", "refrag_kernels.support"}
    graphlib.TopologicalSorter(found).prepare()


def test_a_circle_would_be_found():
    found = imports()
    found["refrag_kernels.support"] = found["refrag_kernels.support"] | {"refrag_kernels.report"}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(found).prepare()


def test_backends_do_not_import_each_other():
    folders = ("cpu_kernels", "cuda_kernels", "triton_kernels")
    for module, names in imports().items():
        folder = module.split(".")[1] if "." in module else ""
        if folder in folders:
            others = {name.split(".")[1] for name in names if name.count(".") > 1} - {folder, "reference"}
            assert not others & set(folders), module
