"""The GPU report: its phases end in time and whatever became of those before, and it tells what each left behind."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.gpu_report import phases, tables
from bench.gpu_report import report as gpu_report
from bench.gpu_report.phases import Phase

ROOT = Path(__file__).parent.parent


def python(code):
    return [(sys.executable, "-c", code)]


def test_a_phase_that_fails_or_hangs_does_not_stop_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(phases, "_GRACE", 0.5)
    wrong = "import sys; print('the reason'); sys.exit(3)"
    planned = [
        Phase("wrong", 20, [*python(wrong), *python("pass")]),
        # What the one before left is this one's too, up to the end of both.
        Phase("slow", -16, python("import time; print('begun', flush=True); time.sleep(100)")),
        Phase("missing", 5, [("no-such-program",)]),
        Phase("left out", 5, python("raise SystemExit(1)"), skip="not here"),
        Phase("right", 10, python("import os; print(os.environ['WHAT'], '{limit}')"), {"WHAT": "limit"}),
    ]
    start = time.monotonic()
    outcomes = phases.run(planned, tmp_path, ROOT)
    assert time.monotonic() - start < 30
    assert [outcome.status for outcome in outcomes] == ["failed", "out of time", "failed", "skipped", "ok"]
    by_name = {outcome.name: outcome for outcome in outcomes}
    assert by_name["wrong"].codes == [3, 0] and by_name["wrong"].tail == "the reason"
    assert by_name["slow"].tail.startswith("begun") and by_name["slow"].seconds <= 4.5
    assert "no-such-program" in by_name["missing"].reason and by_name["left out"].reason == "not here"
    name, limit = (tmp_path / "right-0.log").read_text().split()
    assert name == "limit" and 0 < int(limit) < by_name["right"].limit


def test_what_a_phase_started_ends_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(phases, "_GRACE", 0.2)
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '100']); print(p.pid, flush=True); p.wait()"
    (outcome,) = phases.run([Phase("family", 3, python(child))], tmp_path, ROOT)
    pid = int((tmp_path / "family-0.log").read_text().split()[0])
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid}").exists()
    assert outcome.status == "out of time"


def test_the_phases_take_less_than_nine_minutes(tmp_path, capsys):
    planned = gpu_report.on_gpu(tmp_path)
    assert sum(phase.seconds for phase in planned) < 9 * 60 - 5
    assert gpu_report.main(["--list", "--seconds", "100", "--output", str(tmp_path)]) == 0
    listed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert sum(int(seconds) for _, seconds, _ in listed) == pytest.approx(100, abs=5)
    with pytest.raises(SystemExit):
        gpu_report.main(["--list", "--seconds", "0"])
    rehearsed = gpu_report.rehearsal(tmp_path)
    assert [phase.name for phase in rehearsed] == [phase.name for phase in planned]
    ops = next(phase for phase in planned if phase.name == "ops").commands[0]
    assert "--device cuda" in " ".join(ops) and "--budget {limit}" in " ".join(ops)


def test_the_commands_of_the_benchmarks_are_understood(tmp_path, monkeypatch, capsys):
    """What a GPU would measure, listed without one."""
    from bench import __main__ as command

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    rows = {}
    for phase in gpu_report.on_gpu(tmp_path):
        for words in phase.commands:
            if words[1:4] == ("-m", "bench", "run"):
                arguments = [word.replace("{limit}", "9") for word in words[3:]]
                assert command.main([*arguments, "--list"]) == 0
                rows[phase.name] = capsys.readouterr().out.split()
    assert set(rows) == {"ops", "ops-mha", "model", "ttft", "ttft-k"}
    for name in ("ops", "ops-mha"):
        assert {row.split("/")[0] for row in rows[name]} == set(gpu_report._OPS)
    measured = {tuple(row.split("/")[3:5]) for row in rows["ttft"] + rows["ttft-k"]}
    contexts = (4096, 16384, 65536)
    assert measured == {(f"context={context}", f"k={k}") for context in contexts for k in (8, 16, 32)}


def test_a_report_of_phases_that_left_nothing(tmp_path):
    outcome = phases.Outcome("environment", "failed", 1.0, 25.0, [], [1], "exit code 1", "no driver")
    (tmp_path / "tests-0.jsonl").write_text(
        json.dumps({"test": "t.py::test_a[pool_chunks-triton-float16-3]", "outcome": "failed", "reason": "worse | off"})
        + "\n{cut"
    )
    (tmp_path / "ops.json").write_text("{")
    report = gpu_report.collect(tmp_path, [outcome], False, 2.0)
    gpu_report.write(tmp_path, report)
    text = (tmp_path / "report.md").read_text()
    assert report["verdict"] == "not ok: environment" and report["rows"] == []
    assert "could not be looked at" in text and "no driver" in text and "Not measured." in text
    assert "| tests | pool_chunks-triton-float16 | 0 | 1 | 0 |" in text and "worse \\| off" in text
    assert "Rehearsed" not in text


def test_first_tokens_are_compared_with_the_full_text_of_their_context():
    def row(phase, context, k, contender, seconds):
        ours = contender.startswith("refrag_kernels")
        return {
            "phase": phase, "parameters": {"context": context, "k": k}, "contender": contender, "ours": ours,
            "status": "ok", "median_s": seconds,
        }  # fmt: skip

    rows = [
        row("ttft", 4096, 16, "refrag_kernels", 0.01),
        row("ttft", 4096, 16, "refrag_kernels, with encoding", 0.02),
        row("ttft", 4096, 16, "full text", 0.2),
        row("ttft-k", 4096, 8, "refrag_kernels", 0.04),
        row("ops", 4096, 8, "refrag_kernels", 9.0),
    ]
    lines = tables._first_token(rows, "median_s")
    assert lines[2:] == [
        "| 4,096 | 8 | 200.0 | 40.0 (5.0 x) |  |",
        "| 4,096 | 16 | 200.0 | 10.0 (20.0 x) | 20.0 (10.0 x) |",
    ]
    assert tables._first_token([dict(rows[0], status="failed")], "median_s") == ["Not measured."]
    assert tables._first_token([dict(row, latency_s=None) for row in rows], "latency_s") == ["Not measured."]


def test_the_rehearsal(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    for variable in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[variable]
    command = ["bench/gpu_report.sh", "--dry-run", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    report = json.loads((tmp_path / "report.json").read_text())
    statuses = {phase["name"]: phase["status"] for phase in report["phases"]}
    assert done.returncode == 0 and report["verdict"] == "ok", (statuses, report["phases"])
    skipped = {name for name, status in statuses.items() if status == "skipped"}
    assert skipped <= {"sanitizer", "ops-mha", "model"} and set(statuses.values()) == {"ok", "skipped"}
    assert report["environment"]["rates"]["matmul, float32"] > 0
    ran = {test["test"].partition("[")[2] for test in report["tests"] if test["outcome"] == "passed"}
    wanted = {"pool_chunks-triton]", "pool_chunks-triton-float32-0]", "merge_states-triton-float32-1]"}
    assert ran == wanted, report["tests"]
    assert {row["parameters"].get("k") for row in report["rows"] if row["op"] == "ttft"} == {8, 16, 32}
    assert all(row["status"] == "ok" and row["median_s"] > 0 for row in report["rows"])
    assert len(list(csv.DictReader((tmp_path / "report.csv").open()))) == len(report["rows"])
    text = (tmp_path / "report.md").read_text()
    assert "no figure here is a GPU's" in text and "### append_kv" in text and "| 256 | 32 |" in text
