"""Backend selection: order, restriction, and errors that say why no backend can run."""

import re

import pytest
import torch

import refrag_kernels as rk
from refrag_kernels import backends, extension, registration, selection
from refrag_kernels.support import OPS, Support

plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[20]]))
q = torch.randn(20, 2, 8)


def ran(monkeypatch, call):
    """Return the backends that served ``call``, in order."""
    served = []

    def record(*args):
        served.append(selection.select(*args))
        return served[-1]

    monkeypatch.setattr(registration, "select", record)
    call()
    return [implementation.backend for implementation in served]


def test_the_first_backend_that_supports_the_call_runs(monkeypatch):
    names = backends.available("mixed_attention", q.device)
    assert names[-1] == "reference"
    assert ran(monkeypatch, lambda: rk.mixed_attention(q, q, q, plan)) == names[:1]


def test_float64_goes_to_the_reference(monkeypatch):
    wide = q.double()
    assert ran(monkeypatch, lambda: rk.mixed_attention(wide, wide, wide, plan)) == ["reference"]


def test_the_backend_argument_wins_over_the_context(monkeypatch):
    with rk.use_backend("cuda"):
        call = lambda: rk.mixed_attention(q, q, q, plan, backend="reference")  # noqa: E731
        assert ran(monkeypatch, call) == ["reference"]


def test_the_context_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("REFRAG_KERNELS_BACKEND", "triton,cuda")
    with rk.use_backend("reference"):
        rk.mixed_attention(q, q, q, plan)
    with pytest.raises(RuntimeError, match="triton: .*; cuda: "):
        rk.mixed_attention(q, q, q, plan)


def test_contexts_nest_and_end():
    with rk.use_backend("reference"):
        with rk.use_backend("cuda"), pytest.raises(RuntimeError, match="cuda"):
            rk.mixed_attention(q, q, q, plan)
        rk.mixed_attention(q, q, q, plan)
    assert backends.effective_backend(None) is None


def test_the_backward_pass_uses_the_forward_pass_s_list(monkeypatch):
    leaf = q.clone().requires_grad_()
    with rk.use_backend("reference"):
        out = rk.mixed_attention(leaf, q, q, plan)
    assert ran(monkeypatch, lambda: out.sum().backward()) == ["reference"]


def test_a_list_is_tried_in_order(monkeypatch):
    assert ran(monkeypatch, lambda: rk.mixed_attention(q, q, q, plan, backend="cuda, reference")) == ["reference"]


@pytest.mark.parametrize("names", ["", "cpu,", "CPU", "nope"])
def test_unknown_names(names):
    with pytest.raises(ValueError, match="unknown backend"), rk.use_backend(names):
        pass


def test_the_error_says_why_each_backend_did_not_serve():
    wide = q.double()
    with pytest.raises(RuntimeError, match="refrag::mixed_attention .*cuda: runs on cuda tensors, got cpu"):
        rk.mixed_attention(wide, wide, wide, plan, backend="cuda")


def test_every_op_has_cpu_kernels():
    """Other tests run only on available backends, so without this test a library that fails to load goes unnoticed."""
    assert extension.load_error() is None
    for op in OPS:
        assert backends.available(op, torch.device("cpu")) == ["cpu", "reference"], op


def test_every_op_has_a_row_for_every_backend_in_its_order_of_preference():
    assert list(OPS["mixed_attention"].implementations) == ["triton", "cuda", "cpu", "reference"]
    assert list(OPS["pool_chunks"].implementations) == ["cuda", "triton", "cpu", "reference"]
    assert all(set(op.implementations) == set(selection.BACKENDS) for op in OPS.values())
    with pytest.raises(ValueError, match="support of refrag::op: got rows for cpu, cpu, needs one for each of cuda"):
        registration._implementations("op", "family", [Support("cpu"), Support("cpu")], ["q"], "q")


@pytest.mark.parametrize("op", OPS)
def test_every_row_of_support_leads_to_a_function(op):
    assert extension.load_error() is None
    for implementation in OPS[op].implementations.values():
        if implementation.support.missing is None:
            assert callable(implementation.function)
            assert implementation.support.fallback in (None, *selection.BACKENDS)


def test_a_fallback_is_another_backend_s_function_and_the_report_says_so():
    rows = OPS["pool_chunks_backward"].implementations
    assert rows["cuda"].function is rows["cpu"].function is rows["reference"].function
    report = backends.report()
    assert report.fallbacks["pool_chunks_backward"] == {"cuda": "reference", "cpu": "reference"}
    assert re.search(r"pool_chunks_backward +cpu: cpu \(runs reference\), reference", str(report))


def test_former_names_still_work():
    with pytest.warns(DeprecationWarning, match="effective_backend"):
        assert backends.pinned("cpu") == "cpu"
    with pytest.warns(DeprecationWarning, match="family"):
        assert backends.available("pool_chunks", "pooling", torch.device("cpu")) == ["cpu", "reference"]
