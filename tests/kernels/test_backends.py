"""The choice of a backend: order, restriction, and errors that say why nothing can run."""

import pytest
import torch

import refrag_kernels as rk
from refrag_kernels import backends, extension
from refrag_kernels.registration import FAMILY_OF_OP

plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[20]]))
q = torch.randn(20, 2, 8)


def ran(monkeypatch, call):
    """Return the names of the folders whose code served ``call``, in order."""
    folders = []
    original = backends.select

    def record(*args):
        function = original(*args)
        folders.append(function.__module__.split(".")[1])
        return function

    monkeypatch.setattr(backends, "select", record)
    call()
    return folders


def test_the_first_backend_that_supports_the_call_runs(monkeypatch):
    names = backends.available("mixed_attention", "attention", q.device)
    assert names[-1] == "reference"
    first = {"cpu": "cpu_kernels"}.get(names[0], names[0])
    assert ran(monkeypatch, lambda: rk.mixed_attention(q, q, q, plan)) == [first]


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
    assert backends.pinned(None) is None


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
    """Other tests ask what is available: without this one a library that does not load would leave them less to do."""
    assert extension.load_error() is None
    for op, family in FAMILY_OF_OP.items():
        assert backends.available(op, family, torch.device("cpu")) == ["cpu", "reference"], op


def test_what_is_fastest_comes_first_and_the_rest_in_the_table_s_order():
    assert backends._order("mixed_attention") == ("triton", "cuda", "cpu", "reference")
    assert backends._order("pool_chunks") == tuple(backends._BACKENDS) == ("cuda", "triton", "cpu", "reference")
    assert set(backends._PREFERRED) <= set(FAMILY_OF_OP)
