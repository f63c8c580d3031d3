"""Start the interpreter's tests, each file in a new process."""

import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


@pytest.mark.parametrize("name", sorted(path.name for path in HERE.glob("test_interpreted_*.py")))
def test_in_the_interpreter(name):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-header", str(HERE / name)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    for variable in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[variable]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parent.parent)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
