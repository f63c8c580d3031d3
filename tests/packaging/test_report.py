"""The text of backends.report(), which must not contain anything private."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import refrag_kernels
from refrag_kernels import backends, extension
from refrag_kernels.report import _without_paths
from refrag_kernels.support import OPS

PACKAGE = Path(refrag_kernels.__file__).parent


WITHOUT_EDITABLE_INSTALLS = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
"""


def run_module(root=PACKAGE.parent, **environment):
    command = [sys.executable, "-m", "refrag_kernels"]
    environment = {"PATH": "", "PYTHONPATH": str(root), **environment}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout


def test_report_names_versions_devices_and_who_runs_each_op():
    report = backends.report()
    assert report.versions["refrag-kernels"] == refrag_kernels.__version__
    assert report.versions["torch"] == torch.__version__
    assert report.build["_C"] == report.build["_planner"] == "loaded"
    assert report.devices[0] == "cpu"
    assert report.backends["cpu"] is None and report.backends["reference"] is None
    assert set(report.ops) == set(OPS) and "mixed_attention" in report.ops
    assert all(served["cpu"][-1] == "reference" for served in report.ops.values())
    text = str(report)
    for part in (*report.versions, *report.ops, *report.backends):
        assert part in text


@pytest.mark.parametrize("available", [True, False])
def test_report_tells_why_cuda_can_not_run(monkeypatch, available):
    monkeypatch.setattr(extension, "load_error", lambda: None if available else "the extension _C.so is not built")
    reason = backends.report().backends["cuda"]
    if not available:
        assert reason == "the extension _C.so is not built"
    elif not torch.ops.refrag_cuda.architectures():
        assert "nvcc was not found" in reason
    elif not torch.cuda.is_available():
        assert reason == "torch finds no CUDA device"
    else:
        assert reason is None


def test_python_m_prints_it_with_the_variables_that_matter():
    text = run_module(REFRAG_KERNELS_ISA="portable")
    assert re.search(r"cpu kernels\s+portable\n", text)
    assert re.search(r"REFRAG_KERNELS_ISA\s+portable", text)
    assert not re.search(r"(^|\s)/\w", text)


def test_an_instruction_set_that_does_not_exist_is_named():
    assert re.search(
        r"cpu kernels\s+none: .*REFRAG_KERNELS_ISA: got neon, needs portable", run_module(REFRAG_KERNELS_ISA="neon")
    )


def test_it_works_where_nothing_is_compiled(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "refrag_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    # The import hook of an editable install would find the compiled modules of the original checkout.
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_EDITABLE_INSTALLS)
    text = run_module(tmp_path)
    assert re.search(r"_C\s+the extension _C.so is not built", text)
    assert re.search(r"_planner\s+the extension _planner is not built", text)
    assert re.search(r"\n  cpu\s+no: the extension _C.so is not built", text)
    assert re.search(r"mixed_attention\s+cpu: reference\n", text)


def test_a_library_that_does_not_load_is_told_apart(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "refrag_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "refrag_kernels" / "_C.so").write_text("not a library")
    text = run_module(tmp_path)
    assert re.search(r"_C\s+the extension _C.so does not load: _C.so: (file too short|invalid ELF header)", text)


def test_paths_lose_their_folders():
    assert _without_paths("cannot open /home/someone/lib/_C.so: no") == "cannot open _C.so: no"
    assert _without_paths("gelu/tanh 1/2 sm_90") == "gelu/tanh 1/2 sm_90"
