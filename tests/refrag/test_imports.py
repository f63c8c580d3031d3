"""The import graph of the code: layers, no circular imports, and no training code in inference.

Every import counts, also within functions and under TYPE_CHECKING: a deferred import hides a cycle without breaking it.
The names that ``refrag`` itself re-exports are excluded, since nothing in the subpackages imports from it.
"""

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import refrag

import refrag_kernels

PACKAGES = {package.__name__: Path(package.__path__[0]) for package in (refrag, refrag_kernels)}

# Subpackages and top-level files of refrag, from lowest to highest: each imports only from itself and lower lines.
LAYERS = (
    ("file_modes", "deprecated"),
    ("cache",),
    ("weights", "console"),
    ("model",),
    ("data",),
    ("store",),
    ("processing",),
    ("adapters",),
    ("bundle",),
    ("loading",),
    ("encoding", "retrieval", "training"),
    ("corpus", "demo", "integrations"),
    ("commands",),
    ("cli",),
    ("__main__",),
)


def imports(package):
    """Return, for each module of a package, the modules of the package that it imports."""
    root = PACKAGES[package]
    files = {}
    for path in root.rglob("*.py"):
        parts = (package, *path.relative_to(root).with_suffix("").parts)
        files[".".join(parts).removesuffix(".__init__")] = path
    graph = {}
    for module, path in files.items():
        graph[module] = found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found.update(name if name in files else node.module for name in names)
        found.intersection_update(files)
    return graph


def room_of(module):
    return module.split(".")[1]


@pytest.mark.parametrize(
    "package",
    ["refrag", "refrag_kernels"],
)
def test_no_circles(package):
    graph = imports(package)
    graph[package] = set()
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_nothing_imports_what_the_package_hands_out():
    assert [module for module, found in imports("refrag").items() if "refrag" in found] == []


def test_layers():
    level = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
    graph = imports("refrag")
    del graph["refrag"]
    assert {room_of(module) for module in graph} == level.keys()
    wrong = [
        f"{module} imports {other}"
        for module, found in graph.items()
        for other in found
        if room_of(other) != room_of(module) and level[room_of(other)] >= level[room_of(module)]
    ]
    assert wrong == []


def test_rooms_know_no_circles():
    """Subpackages in the same line have no circular imports either."""
    rooms = {}
    for module, found in imports("refrag").items():
        if module != "refrag":
            own = rooms.setdefault(room_of(module), set())
            own.update(room_of(other) for other in found)
            own.discard(room_of(module))
    graphlib.TopologicalSorter(rooms).prepare()


def test_files_at_the_top():
    files = [path.name for path in PACKAGES["refrag"].iterdir() if path.is_file()]
    assert len(files) <= 14, files


INFERENCE = """
import sys
from pathlib import Path
from refrag import PassageEncoder
from refrag.commands import generate, options
from refrag.loading import load_model, load_processor, load_trained

folder = Path(sys.argv[1])
model, processor = load_model(folder / "model"), load_processor(folder / "model")
load_trained(folder / "adapter", encoder=str(folder / "encoder"), decoder=str(folder / "decoder"))
PassageEncoder.from_model(model, processor).encode([])
model.generate(processor(["What?"]), max_new_tokens=1)
import refrag.demo.caution, refrag.demo.inspection, refrag.demo.streaming
print(*(name for name in sys.modules if name.startswith("refrag.training")))
"""


def test_inference_imports_nothing_of_training():
    fixtures = Path(__file__).parent / "fixtures"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", INFERENCE, fixtures]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
