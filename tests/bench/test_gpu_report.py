"""The GPU report: blocks end in time and run regardless of earlier failures, and the report has what each wrote."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.cases.ops import GPU_OPS
from bench.gpu_report import catalogue, ncu, runner, schema, tables
from bench.gpu_report import report as gpu_report
from bench.gpu_report.block import Options, Results
from bench.gpu_report.catalogue import Block

ROOT = Path(__file__).parents[2]
HERE = Block("tests", 20, "")  # a block that is present


def python(code):
    return [sys.executable, "-c", code]


def limited(seconds):
    return Block(HERE.name, seconds, "")


def test_a_block_that_fails_or_hangs_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_GRACE", 0.5)
    log = tmp_path / "block.log"
    wrong = runner.run(HERE, python("import sys; print('the reason'); sys.exit(3)"), log, ROOT)
    assert (wrong.status, wrong.code, wrong.tail, wrong.reason) == ("failed", 3, "the reason", "exit code 3")
    slow = runner.run(limited(3), python("import time; print('begun', flush=True); time.sleep(100)"), log, ROOT)
    assert slow.status == "out of time" and slow.tail.startswith("begun") and slow.seconds <= 4
    missing = runner.run(HERE, ["no-such-program"], log, ROOT)
    assert missing.status == "failed" and "no-such-program" in missing.reason
    right = runner.run(HERE, python("import os; print(os.environ['WHAT'])"), log, ROOT, {"WHAT": "set"})
    assert right.status == "ok" and log.read_text() == "set\n" and not right.tail
    absent = runner.run(Block("no_such_block", 9, ""), python("raise SystemExit(1)"), log, ROOT)
    assert absent.status == "absent" and absent.seconds == 0


def test_what_a_block_started_ends_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_GRACE", 0.2)
    child = "import subprocess; p = subprocess.Popen(['sleep', '100']); print(p.pid, flush=True)"
    for code, status in ((child + "; p.wait()", "out of time"), (child, "ok")):
        log = tmp_path / f"{status}.log"
        assert runner.run(limited(3), python(code), log, ROOT).status == status
        pid, deadline = int(log.read_text().split()[0]), time.monotonic() + 10
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                break
            time.sleep(0.05)
        else:
            assert not Path(f"/proc/{pid}").exists()


def test_a_block_is_told_a_shorter_time_than_it_has(tmp_path):
    for seconds, told in ((100, "92.0"), (10, "6.0")):
        words = runner.command(limited(seconds), "cuda", tmp_path / "file")
        assert words[words.index("--seconds") + 1] == told


def test_blocks_are_asked_for_by_name_and_seconds():
    chosen = catalogue.choose(["ops=25.5", "tests", "gluon"])
    assert [(block.name, block.seconds) for block in chosen][:2] == [("ops", 25.5), ("tests", 60)]
    shared = catalogue.choose(["ops=40", "environment", "tests"], total=100)
    assert {block.name: block.seconds for block in shared} == {"ops": 40, "environment": 15, "tests": 45}
    assert [block.name for block in catalogue.choose([])] == [block.name for block in catalogue.known()]
    for words, total, message in (
        (["nothing"], None, "--only: got nothing, needs one of environment"),
        (["ops="], None, "--only: got nothing for seconds"),
        (["ops=-1"], None, "--only: got -1 for seconds, needs a number above 0"),
        (["ops=40", "tests"], 30, "--seconds: got 30, needs more than the 40 s"),
    ):
        with pytest.raises(ValueError, match=message):
            catalogue.choose(words, total)


def test_the_listing_names_every_block(capsys):
    assert gpu_report.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == [block.name for block in catalogue.known()]
    for line, block in zip(lines, catalogue.known()):
        assert ("absent" in line) == block.absent and (block.absent or f"{block.seconds:.0f} s" in line)
        assert "catalogue" not in line
    with pytest.raises(SystemExit):
        gpu_report.main(["--list", "--seconds", "0"])


def test_the_page_about_the_report_has_every_block():
    page = (ROOT / "docs" / "how-to" / "gpu-report.md").read_text()
    for block in catalogue.CATALOGUE:
        assert f"| {block.name} | " in page, block


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"case": "a"}, "block: got None"),
        ({"block": "a", "case": ""}, "case: got ''"),
        ({"block": "a", "case": "b", "median_s": "1"}, "median_s: got '1'"),
        ({"block": "a", "case": "b", "plan_s": -1}, "plan_s: got -1"),
        ({"block": "a", "case": "b", "p20_s": 3.0, "median_s": 2.0, "p80_s": 4.0}, "median_s: got 2, needs 3 to 4"),
        ({"block": "a", "case": "b", "error": float("nan")}, "error: not a JSON value"),
        ({"block": "a", "case": "b", "status": "good"}, "status: got 'good'"),
        ({"block": "a", "case": "b", "status": "wrong", "error": 1.0, "median_s": 1.0}, "wrong, but has a time"),
        ({"block": "a", "case": "b", "status": "skipped"}, "skipped, but neither reason nor error"),
        ({"block": "a", "case": "b", "outcome": "good"}, "outcome: got 'good'"),
        ([], "got list"),
    ],
)
def test_what_does_not_fit_the_schema(line, problem):
    assert any(problem in found for found in schema.problems(line)), schema.problems(line)


def test_results_are_lines_that_fit_the_schema(tmp_path, capsys):
    results = Results("ops", tmp_path / "file")
    results.add("a row", median_s=2.0, p20_s=1.0, p80_s=3.0, rate_per_s=-1.0, what={"a": [1, None]}, error=1e-3)
    results.add("another", status="wrong", error=0.5)
    lines = [json.loads(line) for line in (tmp_path / "file").read_text().splitlines()]
    assert [line["case"] for line in lines] == ["a row", "another"] and not any(map(schema.problems, lines))
    assert len(capsys.readouterr().out.splitlines()) == 2
    with pytest.raises(ValueError):
        results.add("not a number", median_s=float("nan"))


def test_a_block_without_time_says_what_it_left_out(tmp_path):
    """A wrong result has no time, a failing row does not stop the next, and rows out of time are listed."""
    import torch

    from bench.engine.case import Case, Entry
    from bench.gpu_report.measured import measure_rows

    def entry(name, value):
        def build():
            if value is None:
                raise RuntimeError("a fault")
            return Case(ours=lambda: torch.tensor([value]), peers={}, expected=lambda: torch.ones(1), bound=1e-3)

        return Entry(name, "case", "any", torch.float32, {}, build)

    rows = [entry("right", 1.0), entry("wrong", 2.0), entry("broken", None), entry("nan", float("nan"))]
    path = tmp_path / "file"
    bad = measure_rows(rows, Options("cpu", time.monotonic() + 60), Results("ops", path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["status"] for line in lines] == ["ok", "wrong", "failed", "wrong"] and len(bad) == 3
    assert not any(map(schema.problems, lines)) and lines[3]["reason"] == "not finite"
    path.unlink()
    assert measure_rows(rows[:1], Options("cuda", time.monotonic()), Results("ops", path)) == []
    (line,) = map(json.loads, path.read_text().splitlines())
    assert (line["status"], line["reason"]) == ("skipped", "out of time") and not schema.problems(line)


def test_a_report_of_blocks_that_left_little(tmp_path):
    outcomes = [
        runner.Outcome("environment", "failed", 1.0, 25.0, [], 1, "exit code 1", "no driver"),
        runner.Outcome("ops", "out of time", 9.0, 9.0, [], -9),
        runner.Outcome("gluon", "absent", 0.0, 60.0, []),
        runner.Outcome("tests", "ok", 2.0, 60.0, [], 0),
    ]
    test = {"block": "tests", "case": "t.py::test_a[pool_chunks-triton-float16-3]", "outcome": "failed", "took_s": 1}
    (tmp_path / "tests.jsonl").write_text(json.dumps({**test, "reason": "worse | off"}) + "\n{cut")
    (tmp_path / "ops.jsonl").write_text('{"block": "ops", "case": "a row", "median_s": -1}\n')
    report = gpu_report.collect(tmp_path, outcomes, False, 2.0)
    gpu_report.write(tmp_path, report)
    text = (tmp_path / "report.md").read_text()
    assert report["verdict"].startswith("not ok: environment (failed), ops (out of time), results") and "gluon" in text
    assert len(report["results"]) == 1 and "median_s: got -1, needs seconds" in text and "no driver" in text
    assert "| tests | pool_chunks-triton-float16 | 0 | 1 | 0 |" in text and "worse \\| off" in text
    assert "Dry run" not in text and len((tmp_path / "results.jsonl").read_text().splitlines()) == 1


def record(op, preset, parameters, contender, **values):
    row = "/".join([op, "case", preset, *(f"{k}={v}" for k, v in parameters.items())])
    base = {"block": "ops", "case": "case", "row": row, "op": op, "preset": preset, "parameters": parameters}
    names = ("share_of_limit", "gflops", "plan_s", "latency_s")
    return (
        base
        | {"contender": contender, "ours": contender.startswith("refrag_kernels"), "status": "ok"}
        | dict(dict.fromkeys(names), **values)
    )


def test_first_tokens_are_compared_with_the_full_text_of_their_context():
    def row(k, contender, seconds):
        return record("ttft", "llama2-7b", {"context": 4096, "k": k}, contender, median_s=seconds)

    rows = [
        row(16, "refrag_kernels", 0.01),
        row(16, "refrag_kernels, with encoding", 0.02),
        row(16, "full text", 0.2),
        row(8, "refrag_kernels", 0.04),
    ]
    lines = tables._first_token(rows, "median_s")
    assert lines[2:] == [
        "| llama2-7b | 4,096 | 8 | 200.0 | 40.0 (5.0 x) |  |",
        "| llama2-7b | 4,096 | 16 | 200.0 | 10.0 (20.0 x) | 20.0 (10.0 x) |",
    ]
    assert tables._first_token([dict(rows[0], status="failed")], "median_s") == ["Not measured."]
    assert tables._first_token(rows, "latency_s") == ["Not measured."]


def test_a_plan_is_added_to_one_layer_and_shared_among_many():
    row = record("mixed_attention", "llama3-8b", {"context": 4096}, "refrag_kernels", median_s=1e-3, gflops=2e5)
    (line,) = tables._plans([{**row, "plan_s": 3.2e-3}], 4e-6)[2:]
    assert line.endswith("| refrag_kernels | 200 | 1 | 0.996 | 3.2 | 4.2 | 1.1 |")
    assert tables._plans([{**row, "gflops": None}], 0.0) == ["Not measured."]


NCU = """==PROF== Connected to process 7 (/usr/bin/python3.12)
==PROF== Profiling "attention_kernel": 0%....50%....100% - 12 passes
"ID","Process ID","Kernel Name","Block Size","gpu__time_duration.sum","lts__t_sectors_op_read.sum",\
"dram__bytes_read.sum",\
"launch__registers_per_thread","sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio"
"","","","","ns","sector","byte","register/thread","%","inst","inst"
"0","7","attention_kernel","(128, 1, 1)","150,000","25000000","84000000","255","27.5","1.5","2.5"
"1","7","fill_kernel","(32, 1, 1)","2000","10","n/a","16","0","0.5","0"
"""


def test_the_counters_of_ncu_are_read():
    first, second = map(ncu.summary, ncu.launches(NCU))
    assert first["kernel"] == "attention_kernel" and first["gpu_time_s"] == pytest.approx(150e-6)
    assert first["l2_read_bytes_per_s"] == pytest.approx(32 * 25e6 / 150e-6) and first["tensor_active"] == 27.5
    assert first["stalls"] == {"barrier": 2.5, "long_scoreboard": 1.5} and first["registers"] == 255
    assert second["dram_bytes"] is None and second["occupancy"] is None and second["kernel"] == "fill_kernel"
    assert ncu.launches("==ERROR== ERR_NVGPUCTRPERM") == []
    assert ncu.errors("a\n==ERROR== Failed to find metric x\n==ERROR== b") == "Failed to find metric x b"
    words = ncu.command("ncu", "log", ["python"])
    assert words[-1] == "python" and words[words.index("--clock-control") + 1] == "none"


def test_the_benchmarks_of_the_blocks_have_rows():
    """List, without a GPU, what a GPU would measure."""
    from bench.gpu_report.blocks import ops, peers, ttft

    rows = [entry.name for entry in ops.entries("cuda")]
    assert len(set(rows)) == len(rows) and {row.split("/")[0] for row in rows} == set(GPU_OPS)
    cases = {row.split("/")[1] for row in rows}
    assert cases >= {"causal", "documents", "blocks", "interleaved", "random_passages", "batch"}
    assert "paged_attention/batch/llama3-8b/context=65536/batch=32/table=131072/bfloat16" in rows
    assert [entry.case for entry in peers.entries("cuda")] == [case for _, case in peers._ROWS]
    measured = {tuple(row.name.split("/")[2:5]) for rows, _ in ttft.groups("cuda") for row in rows}
    contexts = (4096, 16384, 65536)
    whole = {("llama2-7b", f"context={context}", f"k={k}") for context in contexts for k in (8, 16, 32)}
    assert measured == whole | {("llama2-7b-2-layers", "context=4096", "k=16")}


def test_the_dry_run(tmp_path):
    """Run every block of this checkout on the CPU; all lines fit the schema."""
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    for variable in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[variable]
    command = ["bench/gpu_report.sh", "--dry-run", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    report = json.loads((tmp_path / "report.json").read_text())
    statuses = {block["name"]: block["status"] for block in report["blocks"]}
    assert done.returncode == 0 and report["verdict"] == "ok" and not report["unfit"], (statuses, report["blocks"])
    assert statuses == {block.name: "absent" if block.absent else "ok" for block in catalogue.known()}
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert lines == report["results"] and not any(map(schema.problems, lines))
    assert {line["block"] for line in lines} == {name for name, status in statuses.items() if status == "ok"}
    ran = {line["case"].rpartition("::")[2] for line in lines if line.get("outcome") == "passed"}
    assert {"test_sample[pool_chunks-triton]", "test_attention_replays_on_a_refilled_plan[triton]"} <= ran
    assert "test_against_float64[merge_states-triton-float32-1]" in ran
    rows = tables.rows(lines)
    assert {row["op"] for row in rows} >= {"append_kv", "pool_chunks", "paged_attention", "mixed_attention", "ttft"}
    assert all(row["status"] == "ok" and row["median_s"] > 0 for row in rows if row["ours"])
    assert len(list(csv.DictReader((tmp_path / "report.csv").open()))) == len(rows)
    text = (tmp_path / "report.md").read_text()
    assert (
        "no figure here is from a GPU" in text
        and "### append_kv" in text
        and "plan + one layer" in text
        and "| tiny | 256 | 16 |" in text
    )
