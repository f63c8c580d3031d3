"""docs/how-to/add-an-op.md: applying its blocks to a copy of the repository gives an op whose tests pass."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "how-to" / "add-an-op.md").read_text()
BLOCKS = re.findall(r'^```(\w+) title="([^"]+)"\n(.*?)^```$', PAGE, re.MULTILINE | re.DOTALL)
FILES = [(name, text, language) for language, name, text in BLOCKS if language != "sh"]
# What a copy needs to run the commands. The objects in build/ avoid compiling all but the new sources.
PARTS = ("bench", "csrc", "docs", "python", "refrag_kernels", "tests", "mkdocs.yml", "pyproject.toml", "setup.py")
OBJECTS = Path("build") / sys.implementation.cache_tag


def edited(text, diff, name):
    """Apply a hunk without line numbers to ``text``; its old lines must occur exactly once."""
    lines = diff.splitlines(keepends=True)
    old, new = ("".join(line[1:] for line in lines if line[0] != sign) for sign in "+-")
    assert text.count(old) == 1, f"{name}: got {text.count(old)} places for\n{old}"
    return text.replace(old, new)


def apply(tree, name, text, language):
    """Write a file from the page, or apply a diff to it."""
    path = tree / name
    if language == "diff":
        path.write_text(edited(path.read_text(), text, name))
    else:
        assert not path.exists(), f"{name}: exists already"
        path.write_text(text)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Return a copy of the repository that keeps file times, so that ninja sees what is up to date."""
    if not (ROOT / OBJECTS / "build.ninja").exists():
        pytest.skip(f"{OBJECTS} has no objects to start from: make build")
    copy = tmp_path_factory.mktemp("repository")
    caches = shutil.ignore_patterns("__pycache__", "*.gz")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, copy / part, ignore=caches)
        else:
            shutil.copy2(ROOT / part, copy / part)
    shutil.copytree(ROOT / OBJECTS, copy / OBJECTS)
    return copy


def run(tree, command):
    """Run a line of a shell block with this interpreter."""
    words = shlex.split(command)
    variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    words = words[len(variables) :]
    words = [sys.executable, *(["-m", "pytest"] if words[0] == "pytest" else []), *words[1:]]
    environment = os.environ | {"PYTHONPATH": f"{tree}:{tree / 'python'}"} | variables
    done = subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-8000:]}{done.stderr[-4000:]}"
    return done.stdout


def test_the_page_lists_its_files():
    table = re.findall(r"^\| (`.*?) \| ", PAGE, re.MULTILINE)
    assert sorted(re.findall(r"`([^`]+)`", " ".join(table))) == sorted({name for name, *_ in FILES})


def test_an_op_of_the_cpu_touches_at_most_8_files():
    assert len({name for name, *_ in FILES if "triton" not in name}) <= 8


def test_the_steps_in_order(tree):
    """Apply files and run commands in the page's order; the tests run must be those that the page lists."""
    passed = 0
    for language, name, text in BLOCKS:
        if language == "sh":
            for command in text.splitlines():
                output = run(tree, command)
                passed += sum(map(int, re.findall(r"(\d+) passed", output)))
                assert command.startswith("pytest") <= ("passed" in output), output
                if command.endswith("-m refrag_kernels"):
                    assert "scale_rows" in output
        else:
            apply(tree, name, text, language)
    assert passed >= 50
