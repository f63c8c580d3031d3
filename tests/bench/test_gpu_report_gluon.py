"""The Gluon block of the GPU report: its dry run, and that a hanging kernel costs only its own time."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton.experimental.gluon", exc_type=ImportError)

from bench.gpu_report import watched  # noqa: E402
from bench.gpu_report.block import Options, Results  # noqa: E402
from bench.gpu_report.blocks import gluon  # noqa: E402

ROOT = Path(__file__).parents[2]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_dry_run(tmp_path):
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }  # fmt: skip
    command = [sys.executable, "-m", "bench.gpu_report.blocks.gluon", "--device", "cpu", "--results"]
    subprocess.run([*command, str(tmp_path / "results.jsonl")], cwd=ROOT, env=environment, check=True)
    check, *times, verdict = read(tmp_path / "results.jsonl")
    assert check["case"].startswith("check, ") and check["right"] and check["repeats_equal"]
    assert check["error"] < 4e-3 and check["lse_error"] < 5e-6
    assert [line["contender"] for line in times] == ["gluon, 128 keys x 2", "refrag_kernels"]
    assert all(0 < line["p20_s"] <= line["median_s"] <= line["p80_s"] and line["tflops"] > 0 for line in times)
    assert verdict["right"] == ["128 keys x 2"] and verdict["checked"] == 1


def worker(first, right):
    """Return a worker that hangs at its second check, fails at its third, and times ``right`` after the fourth."""
    return f"""
import json, sys, time
def write(**values): print(json.dumps(values), flush=True)
print("not of JSON")
for number in range({first}, 4):
    write(begin=str(number), checks=True)
    if number == 1: time.sleep(60)
    if number == 2: sys.exit(3)
    write(case="check", config=str(number), right=number != 3)
write(begin="times", checks=False)
write(case="times", of={right})
time.sleep(60)
"""


def test_after_a_hang_come_the_others(tmp_path, monkeypatch):
    def lines(options, first, right):
        return watched.lines([sys.executable, "-c", worker(first, right)], start=20, patience=1)

    monkeypatch.setattr(gluon, "_lines", lines)
    monkeypatch.setattr(gluon, "_compile", lambda options, results: None)
    gluon.block(Options("cuda", time.monotonic() + 60), Results("gluon", tmp_path / "results.jsonl"))
    results = [
        {name: value for name, value in line.items() if name != "block"} for line in read(tmp_path / "results.jsonl")
    ]
    silent = "nothing written for 1 s, or out of time"
    assert results == [
        {"case": "check", "config": "0", "right": True},
        {"case": "hang", "begin": "1", "checks": True, "reason": silent},
        {"case": "failure", "begin": "2", "checks": True, "reason": "exit code 3"},
        {"case": "check", "config": "3", "right": False},
        {"case": "times", "of": ["0"]},
        {"case": "hang", "begin": "times", "checks": False, "reason": silent},
        {"case": "verdict", "right": ["0"], "checked": 4},
    ]


def test_a_silent_process_is_ended_with_what_it_started():
    child = (
        "import subprocess; p = subprocess.Popen(['sleep', '60']); print('{\"pid\": %d}' % p.pid, flush=True); p.wait()"
    )
    running = watched.lines([sys.executable, "-c", child], start=20, patience=0.5)
    pid = next(running)["pid"]
    with pytest.raises(watched.Silent, match="nothing written for 0 s"):
        next(running)
    assert _ends(pid)


def test_checks_are_for_their_configurations():
    """Every configuration accepts its check's plan; on a GPU a rejected plan would waste the check."""
    from bench.gpu_report import gluon_cases as cases

    named = {name: config for configs in cases.CONFIGS.values() for name, config in configs.items()}
    assert set(named) == set(cases.CHECKS)
    for name, problem in cases.CHECKS.items():
        assert name in cases.CONFIGS[problem.group], name
        work = cases.attention_hopper.divide(problem.plan("cpu"), *problem.heads, programs=132, config=named[name])
        assert bool(work.partial_tiles.shape[0]) == named[name].masks, name
        assert not cases.attention_hopper.unsupported_tensors(*problem.tensors("cpu")), name
    assert {problem.group for problem in cases.TIMED} == set(cases.CONFIGS)


def _ends(pid: int) -> bool:
    """Return whether a process exits (or becomes a zombie) within seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            status = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return True
        if status.rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False
