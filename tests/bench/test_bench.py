"""Benchmarks check a contender before timing it, and record no time for a wrong result."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench.cases import table
from bench.cases.ops import KERNEL_OPS, MODEL_OPS, OPS
from bench.cases.presets import PRESETS
from bench.cases.prompts import Passages, Prompt
from bench.engine import results
from bench.engine.case import Case, Entry, Goal, Skip, Sweep, bound_of, error_of
from bench.engine.compare import compare, percentage
from bench.engine.run import OURS, measure
from bench.engine.timing import interleave, peak_bytes, rotated

pytestmark = pytest.mark.cpp

ROOT = Path(__file__).parents[2]

product = torch.randn(8, 8)
right = Case(
    ours=lambda: product @ product,
    peers={"einsum": lambda: torch.einsum("ij,jk->ik", product, product)},
    expected=lambda: product.double() @ product.double(),
    bound=bound_of(torch.float32),
    flops=2.0 * 8**3,
    limit="matmul",
)


def entry(case=right):
    return Entry("product", "square", "any", torch.float32, {"side": 8}, lambda: case)


def fail(reason):
    raise Skip(reason)


def test_calls_are_timed_in_turns():
    order = []
    times = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warm_up=1)
    assert order == ["a", "b"] * 4
    assert len(times["a"].rounds) == 3 and times["a"].least <= times["a"].median <= times["a"].quantile(1.0)


def test_a_gpu_is_timed_between_events_with_cold_caches(monkeypatch):
    """On a GPU: overwrite the caches, sleep, record an event, call, record an event, and synchronize."""
    order, now = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("event")
            self.at = now[0]

        def synchronize(self):
            order.append("wait")

        def elapsed_time(self, end):
            return end.at - self.at

    def call():
        order.append("call")
        now[0] += 5.0  # milliseconds, as events count

    caches = type("Caches", (), {"zero_": lambda self: order.append("caches")})()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("idle"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("busy") if cycles >= 2e6 else None)
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: caches if device == "cuda" and size > 1e8 else None)
    times = interleave({"a": call}, rounds=2, warm_up=1, device="cuda")
    assert order == ["idle", "caches", "busy", "event", "call", "event", "wait", "call", "idle"] * 3
    assert times["a"].rounds == (0.005, 0.005)
    assert len(times["a"].whole) == 2 and 0 < times["a"].latency < 1

    def long():
        order.append("long")
        now[0] += 100.0

    order.clear()
    times = interleave({"a": long}, rounds=1, warm_up=1, device="cuda")
    assert order == ["idle", "caches", "busy", "event", "long", "event", "wait", "long", "idle"] + [
        "idle", "event", "long", "event", "wait",
    ]  # fmt: skip
    assert times["a"].rounds == (0.1,)


def test_calls_take_turns_among_copies_of_their_tensors(monkeypatch):
    order = []
    turns = rotated([lambda: order.append(1), lambda: order.append(2), lambda: order.append(3)])
    for _ in range(4):
        turns()
    assert order == [1, 2, 3, 1]

    built, called = [], []

    def build():
        copy = len(built)
        built.append(copy)
        peers = {"peer": lambda: called.append(("peer", copy))}
        return Case(ours=lambda: called.append((OURS, copy)), peers=peers, max_copies=2)

    measure(dataclasses.replace(entry(), build=build), rounds=4, copies=3, memory=False)
    assert built == [0, 1]
    # One call per contender to check its result; two warm-up rounds, one per copy; four timed rounds.
    assert called == [(OURS, 0), ("peer", 0)] + [(who, copy) for copy in (0, 1) * 3 for who in (OURS, "peer")]


def test_errors_end_a_row_and_not_the_run(monkeypatch, capsys, tmp_path):
    def broken():
        raise RuntimeError("a fault\nwith details")

    outcome = measure(entry(dataclasses.replace(right, peers={"broken": broken})), rounds=1)
    assert outcome.skipped == {"broken": "RuntimeError: a fault"} and OURS in outcome.times
    rows = [entry(dataclasses.replace(right, ours=broken)), entry()]
    monkeypatch.setattr(table, "published", lambda *_: rows)
    file = tmp_path / "run.json"
    assert command.main(["run", "--rounds", "1", "--json", str(file)]) == 1
    first, *others = results.read(file)["rows"]
    assert (first["status"], first["reason"], first["median_s"]) == ("failed", "RuntimeError: a fault", None)
    assert [row["status"] for row in others] == ["ok", "ok"]
    shown = capsys.readouterr()
    assert "failed (RuntimeError: a fault)" in shown.out and "Traceback" in shown.err
    assert "failed: RuntimeError: a fault" in results.markdown(results.read(file))


def test_what_a_budget_leaves_out_is_told(monkeypatch, capsys):
    monkeypatch.setattr(table, "published", lambda *_: [entry(), entry()])
    assert command.main(["run", "--rounds", "1", "--budget", "0", "--no-peers"]) == 0
    assert capsys.readouterr().out.count("skipped (the 0 s of --budget had passed)") == 2


def test_without_peers_ours_is_timed_alone():
    assert set(measure(entry(), rounds=1, with_peers=False).times) == {OURS}


def test_a_wrong_result_has_an_error_and_no_time():
    outcome = measure(entry(dataclasses.replace(right, ours=lambda: product @ product + 1)), rounds=1)
    assert outcome.wrong[OURS] > right.bound and OURS not in outcome.times
    (record,) = [row for row in results.records(outcome) if row["ours"]]
    assert record["status"] == "wrong" and record["median_s"] is None and record["speed_up"] is None
    assert "WRONG" in results.text(outcome)


def test_a_wrong_peer_is_no_peer():
    outcome = measure(entry(dataclasses.replace(right, peers={"zero": lambda: product * 0})), rounds=1)
    assert outcome.wrong["zero"] == 1.0 and outcome.best_peer is None and OURS in outcome.times


def test_without_refcheck_nothing_is_compared():
    case = dataclasses.replace(right, ours=lambda: product @ product + 1)
    assert not measure(entry(case), rounds=1, refcheck=False).wrong


def test_a_row_that_cannot_run_says_why():
    def build():
        raise Skip("needs 900 GiB")

    outcome = measure(dataclasses.replace(entry(), build=build), rounds=1)
    assert outcome.skipped == {OURS: "needs 900 GiB"} and "skipped (needs 900 GiB)" in results.text(outcome)
    case = dataclasses.replace(right, peers={"gpu": lambda: fail("not installed")})
    assert measure(entry(case), rounds=1).skipped == {"gpu": "not installed"}


def test_a_missed_goal_is_named():
    outcome = measure(entry(), rounds=1, goal=Goal(against_peers=1e9))
    assert outcome.best_peer == "einsum" and "goal 1000000000.00" in outcome.misses()[0]
    assert 0 < outcome.share() < 1


def test_ours_is_timed_on_each_backend():
    (row,) = [row for row in table.entries(Sweep(context=(512,))) if row.name.startswith("pool_chunks") and
              row.dtype == torch.float32]  # fmt: skip
    outcome = measure(row, rounds=1, backends=["cpu", "reference", "triton"])
    assert {f"{OURS}, cpu", f"{OURS}, reference"} <= set(outcome.times)
    if not torch.cuda.is_available():
        assert "triton: runs on cuda tensors" in outcome.skipped[f"{OURS}, triton"]


def test_errors_of_tuples_and_nan():
    one = torch.ones(3)
    assert error_of((one, one), (one, one * 2)) == 0.5
    assert error_of(one * float("nan"), one) == float("inf")
    assert error_of(one, torch.ones(4)) == float("inf")


def test_peak_memory_counts_what_is_held_at_once():
    def call():
        first = torch.empty(1000)
        second = torch.empty(1000)
        del first, second
        return torch.empty(500)

    assert 8000 <= peak_bytes(call) < 10000


@pytest.mark.parametrize("density", [0.06, 0.12, 0.265, 0.5])
def test_passages_have_the_density_asked_for(density):
    passages = Passages(4096, 16, density)
    assert sum(passages.spans()) == 4096 and passages.dense().double().mean() == pytest.approx(density, rel=0.05)
    assert passages.plan().stats()["pairs_allowed"] == int(passages.dense().sum())


def test_prompts():
    prompt = Prompt(1024, 16, 0.25)
    assert sum(prompt.expanded()) == 14 and prompt.layout().total_rows == 128 + 42 + 14 * 16
    with pytest.raises(Skip, match="too short"):
        Prompt(100, 16, 0.0)
    with pytest.raises(Skip, match="less than a chunk"):
        Passages(4096, 16, 0.001).spans()


def test_the_table_has_every_op_and_each_goal_a_row():
    rows = table.published()
    assert {row.op for row in rows} == set(OPS)
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert set(table._GOALS) <= set(names)


def test_presets_have_the_sizes_of_their_names():
    billions = {
        "smollm2-135m": 0.135,
        "llama3.2-1b": 1.24,
        "llama2-7b": 6.74,
        "llama2-13b": 13.0,
        "llama3-8b": 8.03,
        "llama3-70b": 70.6,
        "qwen3-4b": 4.02,
    }
    assert {name: PRESETS[name].parameters() / 1e9 for name in billions} == pytest.approx(billions, rel=0.01)
    cut = dataclasses.replace(PRESETS["llama2-7b"], layers=2, encoder_layers=2)
    assert set(PRESETS) - set(billions) == {"llama2-7b-2-layers", "tiny"} and PRESETS["llama2-7b-2-layers"] == cut


# The rows of a small sweep; a separate test covers the model's rows with a smaller model.
SMALL = list(table.entries(Sweep(context=(256,), density=(0.7,)), flex=False, ops=KERNEL_OPS))


@pytest.mark.parametrize("row", SMALL, ids=lambda row: row.name)
def test_every_row_is_right(row):
    outcome = measure(row, rounds=1)
    assert not outcome.wrong, outcome.wrong
    assert OURS in outcome.times and len(outcome.times) >= 2
    assert outcome.peaks[OURS] >= 0


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_rows_of_the_model_are_right(family, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(PRESETS["tiny"], family=family))
    sweep = Sweep(presets=("tiny",), context=(256,), expand=(0.25,), dtypes=(torch.float32,))
    rows = list(table.entries(sweep, ops=MODEL_OPS))
    assert [row.op for row in rows] == list(MODEL_OPS)
    for row in rows:
        outcome = measure(row, rounds=1)
        contenders = {"ttft": 4, "decode": 2, "passage_cache": 3, "kv_slots": 3}[row.op]
        assert not outcome.wrong and len(outcome.errors) == len(outcome.times) == contenders


def test_a_model_that_does_not_fit_is_skipped(monkeypatch):
    monkeypatch.setitem(PRESETS, "huge", dataclasses.replace(PRESETS["llama2-7b"], layers=4000))
    row = next(row for row in table.entries(Sweep(presets=("huge",))) if row.op == "ttft")
    assert "GiB of memory for the weights" in measure(row, rounds=1).skipped[OURS]


@pytest.mark.parametrize(
    "row", [row for row in table.published() if row.op != "mixed_attention"][:4], ids=lambda row: row.name
)
def test_the_command_of_a_row_selects_it(row):
    options = command._parser().parse_args(row.command.split()[3:])
    assert [chosen.name for chosen in command._selected(options)] == [row.name]


def test_rows_on_request_are_those_whose_case_is_named():
    sweep = Sweep(presets=("llama3-8b",), batch=(1, 32), table=(0, 131072))
    rows = [row for row in table.entries(sweep) if row.on_request]
    cases = {"causal", "documents", "blocks", "interleaved", "random_passages", "batch"}
    assert {row.case for row in rows} == cases and not any(row.on_request for row in table.published())
    for row in rows:
        options = command._parser().parse_args(row.command.split()[3:])
        assert [chosen.name for chosen in command._selected(options)] == [row.name]
    options = command._parser().parse_args(["run", "--preset", "llama3-8b"])
    assert not cases & {row.case for row in command._selected(options)}


def test_what_a_plan_takes_is_told_of_contenders_that_have_one():
    plans = {OURS: lambda: None, "einsum": lambda: None, "not here": lambda: fail("not called")}
    outcome = measure(entry(dataclasses.replace(right, plans=plans)), rounds=1, backends=["cpu", "reference"])
    assert set(outcome.plans) == {f"{OURS}, cpu", f"{OURS}, reference", "einsum"}
    assert all(record["plan_s"] >= 0 for record in results.records(outcome))


def bench(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )  # fmt: skip


def test_the_command_writes_its_figures(tmp_path):
    files = {name: tmp_path / "figures" / f"bench.{name}" for name in ("json", "csv", "markdown")}
    options = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    arguments = ["--op", "pool_chunks", "--k", "8", "16", "--context", "256", "512", "1024", "--dtype", "float32"]
    done = bench("run", *arguments, "--rounds", "1", "--repro", *options)
    assert done.returncode == 0, done.stderr
    assert "python -m bench run --op pool_chunks --case mean --preset smollm2-135m --context 256 --k 8" in done.stdout
    run = json.loads(files["json"].read_text())
    ours = [row for row in run["rows"] if row["ours"]]
    assert len(ours) == 6 and all(row["median_s"] > 0 and row["error"] < 2e-6 for row in ours)
    assert run["environment"]["versions"]["torch"] == torch.__version__ and run["environment"]["commit"]
    rows = list(csv.DictReader(files["csv"].open()))
    assert len(rows) == len(run["rows"]) and {"k", "context", "median_s"} <= set(rows[0])
    assert "### pool_chunks" in files["markdown"].read_text()

    pictures = bench("plot", str(files["json"]), "--output", str(tmp_path / "plots"))
    assert pictures.returncode == 0, pictures.stderr
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert "pool_chunks.png" in names and any("context" in name for name in names)
    assert all((tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert bench("report", str(files["json"])).stdout == files["markdown"].read_text()


def test_a_wrong_result_makes_the_exit_code_1(monkeypatch, capsys):
    wrong = dataclasses.replace(right, ours=lambda: product @ product + 1)
    monkeypatch.setattr(table, "published", lambda *_: [entry(wrong)])
    assert command.main(["run", "--rounds", "1"]) == 1
    assert "WRONG" in capsys.readouterr().out
    monkeypatch.setattr(table, "published", lambda *_: [entry()])
    assert command.main(["run", "--rounds", "1"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--expand", "2"], "--expand: got 2, needs 0 to 1"),
        (["run", "--k", "0"], "--k: got 0"),
        (["run", "--rounds", "0"], "--rounds: got 0, needs 1 or more"),
        (["run", "--only", "nothing of the kind"], "no row matches"),
        (["plot", "missing.json"], "missing.json"),
        (["report", "README.md"], "README.md"),
        (["compare", "a.json", "b.json", "--fail-over", "x"], "--fail-over: got 'x'"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_compare():
    def run(**medians):
        rows = [
            {"row": name, "contender": OURS, "ours": True, "status": "ok" if value else "wrong", "median_s": value}
            for name, value in medians.items()
        ]
        return {"rows": rows}

    assert percentage("10%") == 0.1 and percentage("2.5") == 0.025
    lines, failed = compare(run(a=1.0, b=1.0), run(a=1.05, b=1.0, c=2.0), 0.1)
    assert not failed and "+5.0 %" in lines[0] and "c, refrag_kernels: new" in lines
    assert compare(run(a=1.0), run(a=1.2), 0.1)[1]
    assert compare(run(a=1.0), run(a=None), 0.1)[1]
    assert compare(run(a=1.0, b=1.0), run(b=1.0), 0.1)[1]
    assert compare(run(a=1.0), run(b=1.0), 0.1)[1]


def test_the_pytest_benchmarks_are_of_the_same_table():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/bench", "-m", "published", "-q", "--collect-only", "-p", "no:xdist"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    names = [row.name for row in table.published(ops=KERNEL_OPS)]
    assert all(f"[ours-{name}]" in done.stdout for name in names), done.stdout


IMPORTS = """
import sys
from bench.__main__ import main
assert main(["run", "--op", "pool_chunks", "--preset", "smollm2-135m", "--context", "64", "--rounds", "1"]) == 0
unwanted = ("refrag", "transformers", "bench.cases.model")
print(*(name for name in sys.modules if name in unwanted))
"""


def test_a_kernel_benchmark_does_not_import_the_model_package():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""
