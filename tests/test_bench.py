"""The benchmarks: what they measure is checked first, and a wrong result has no time."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import torch

from bench.case import Case, Goal, bound_of, error_of
from bench.run import OURS, measure
from bench.timing import interleave

ROOT = Path(__file__).parent.parent

product = torch.randn(8, 8)
right = Case(
    op="product",
    name="8 x 8",
    dtype=torch.float32,
    ours=lambda: product @ product,
    peers={"einsum": lambda: torch.einsum("ij,jk->ik", product, product)},
    expected=lambda: product.double() @ product.double(),
    bound=bound_of(torch.float32),
    flops=2.0 * 8**3,
    goal=Goal(against_peers=1e9),
)


def test_calls_are_timed_in_turns():
    order = []
    times = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warm_up=1)
    assert order == ["a", "b"] * 4
    assert len(times["a"].rounds) == 3 and times["a"].least <= times["a"].median <= times["a"].quantile(1.0)


def test_a_wrong_result_has_an_error_and_no_time():
    case = dataclasses.replace(right, ours=lambda: product @ product + 1)
    outcome = measure(case, rounds=1)
    assert outcome.wrong[OURS] > case.bound and OURS not in outcome.times
    assert outcome.speed_up() is None and outcome.misses()


def test_a_missed_goal_is_named():
    outcome = measure(right, rounds=1)
    assert outcome.best_peer == "einsum" and "goal 1000000000.00" in outcome.misses()[0]
    assert 0 < outcome.share() < 1


def test_errors_of_tuples_and_nan():
    one = torch.ones(3)
    assert error_of((one, one), (one, one * 2)) == 0.5
    assert error_of(one * float("nan"), one) == float("inf")


def test_the_command_writes_its_figures(tmp_path):
    output = tmp_path / "figures" / "bench.json"
    command = [sys.executable, "-m", "bench", "run", "--only", "encoder", "--rounds", "1", "--no-flex"]
    done = subprocess.run([*command, "--output", str(output)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(output.read_text())["cases"]
    assert [case["dtype"] for case in figures] == ["float32", "bfloat16"]
    assert all(case["seconds"][OURS]["median"] > 0 and not case["wrong"] for case in figures)
    assert "against the best peer" in done.stdout or "best peer" in done.stdout
