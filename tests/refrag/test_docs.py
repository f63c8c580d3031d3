"""The documentation: every code block runs, pictures are up to date, and every public name has a page."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import yaml

import refrag_kernels as rk

# Packages that the tests' environment lacks; see make test-integrations.
OPTIONAL = ("haystack", "kernels", "langchain_core", "llama_index")

ROOT = Path(__file__).parents[2]
PAGES = {str(path.relative_to(ROOT / "docs")): path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))}
WITH_FRAMEWORKS = ("how-to/rag-frameworks.md", "how-to/sglang.md", "how-to/transformers.md")
BLOCKS = [
    pytest.param(block, id=f"{name}-{number}", marks=pytest.mark.integrations if name in WITH_FRAMEWORKS else ())
    for name, text in PAGES.items()
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_block(block):
    for package in OPTIONAL:
        if re.search(rf"^(from|import) {package}\b", block, re.MULTILINE):
            pytest.importorskip(package)
    torch.manual_seed(0)
    assert "assert" in block, "a block that shows something has to check it"
    with torch.enable_grad():
        exec(compile(block, "block", "exec"), {})


def loaded(name):
    """Return a module of docs/."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = re.findall(r"[\w/-]+\.md", str(loaded("navigation").expanded(nav, ROOT / "docs")))
    assert sorted(listed) == sorted(PAGES)


def test_what_is_public_has_a_page():
    text = "\n".join(PAGES.values())
    missing = [name for name in rk.__all__ if f"::: refrag_kernels.{name}\n" not in text]
    assert missing == ["use_backend"]  # documented by its use on the page about backends


def test_the_pictures_are_up_to_date():
    module = loaded("pictures")
    for name, svg in module.pictures().items():
        assert (module.FOLDER / name).read_text() == svg, f"{name} is old: run python docs/pictures.py"
        assert any(f"images/{name}" in page for page in PAGES.values()), f"{name} is on no page"
