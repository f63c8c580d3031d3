"""Argument checks are skipped for arguments like those accepted before, and only for those."""

import pytest
import torch

import refrag_kernels as rk
from refrag_kernels import validation

layout = rk.ChunkLayout.from_lengths([[6]])
plan = rk.plan_attention(layout)
q, k = torch.randn(6, 2, 16), torch.randn(6, 1, 16)


def counting():
    calls = []

    @validation.remembered
    def check(tensor, other, mode):
        calls.append(mode)
        validation.check_same_dtype(tensor=tensor, other=other)

    return check, calls


def test_a_check_runs_once_for_arguments_of_a_kind():
    check, calls = counting()
    for tensor in (q, torch.zeros_like(q), torch.nn.Parameter(q)):
        check(tensor, tensor, "a")
    assert len(calls) == 1
    for other in (
        q[:5],
        q.transpose(0, 1),
        q.double(),
        q.to("meta"),
        torch.empty(6, 2, 20)[..., :16],
    ):
        check(other, other, "a")
    check(q, q, "b")
    assert len(calls) == 7


def test_what_was_refused_is_refused_again():
    check, calls = counting()
    for _ in range(2):
        with pytest.raises(TypeError, match="other: got dtype float64, needs float32"):
            check(q, q.double(), "a")
    assert len(calls) == 2


def test_what_autocast_lets_pass_is_not_remembered():
    check, _ = counting()
    with torch.autocast("cpu", torch.bfloat16):
        check(q, q.bfloat16(), "a")
    with pytest.raises(TypeError, match="other: got dtype bfloat16"):
        check(q, q.bfloat16(), "a")


def test_kinds_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(validation, "_MOST_REMEMBERED", 2)
    check, calls = counting()
    for _ in range(2):
        for rows in range(1, 4):
            check(q[:rows], q[:rows], "a")
    assert len(calls) >= 5


def test_a_good_call_does_not_excuse_a_bad_one():
    rk.mixed_attention(q, k, k, plan)
    other = rk.plan_attention(rk.ChunkLayout.from_lengths([[7]]))
    for bad, message in (
        (lambda: rk.mixed_attention(q, k, k, other), "plan: got a plan for 7 rows of q"),
        (lambda: rk.mixed_attention(q, k, k[:5], plan), "v: got shape"),
        (lambda: rk.mixed_attention(q, k, k.double(), plan), "v: got dtype float64"),
        (lambda: rk.mixed_attention(q, k, k, plan.to("meta")), "plan: got device meta, needs cpu, the device of q"),
        (lambda: rk.mixed_attention(q, k, torch.randn(6, 1, 32)[..., ::2], plan), "v: got stride 2"),
        (lambda: rk.mixed_attention(q, k, k, plan, sinks=torch.zeros(3)), "sinks: got shape"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            bad()
        rk.mixed_attention(q, k, k, plan)
