"""Replay calls as a CUDA graph does: the same kernels, tensors and numbers, with new contents of the buffers.

A graph runs no Python. The launches of a call, and the torch operators between them, are recorded and run again after
the buffers of plan, tables and inputs are refilled; anything that the call read on the host would be out of date.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

import refrag_kernels as rk
from refrag_kernels.triton_kernels import attention, paged, projection
from tests.support.accuracy import GRADIENT, LSE, OUTPUT, relative_error
from tests.support.paged_problems import assert_rows_close, make_problem


class Recording(TorchDispatchMode):
    """Records torch operators and kernel launches in order, and replays them."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), "reads values"
        result = func(*args, **kwargs)
        if not func._schema.name.startswith(("aten::empty", "aten::new_empty")):
            self.steps.append((func, args, kwargs, result))
        return result

    @contextlib.contextmanager
    def recording(self, monkeypatch):
        launch = interpreter.GridExecutor.__call__

        def recorded(executor, *args, **kwargs):
            self.steps.append((launch, (executor, *args), kwargs, None))
            with torch.utils._python_dispatch._disable_current_modes():  # the interpreter's own copies are not recorded
                return launch(executor, *args, **kwargs)

        with monkeypatch.context() as patch, self:
            patch.setattr(interpreter.GridExecutor, "__call__", recorded)
            yield

    def replay(self):
        for call, args, kwargs, result in self.steps:
            again = call(*args, **kwargs)
            if isinstance(result, torch.Tensor) and again.data_ptr() != result.data_ptr():
                result.copy_(again)  # a graph's tensors keep their addresses


def test_attention_forward_and_backward(monkeypatch):
    capacity = rk.PlanCapacity.for_rows(96, sequences=3, ranges_per_block=8)
    q, k, v, grad = (torch.zeros(96, heads, 16) for heads in (4, 2, 2, 4))
    sinks = torch.tensor([0.3, -1.0, 0.0, 2.0])
    plan, recording, results = None, Recording(), None
    for seed, (lengths, mask) in enumerate(
        (
            ([[20, 1, 1, 20]], rk.ChunkMask.full()),
            ([[16, 16, 16, 16], [9, 20]], rk.ChunkMask.passages(torch.tensor([-1, 0, 0, 1, -1, 2]))),
            ([[1]], rk.ChunkMask.full()),
        )
    ):
        layout = rk.ChunkLayout.from_lengths(lengths)
        rows = layout.total_rows
        plan = rk.plan_attention(layout, mask, capacity=capacity, out=plan)
        generator = torch.Generator().manual_seed(seed)
        for tensor in (q, k, v, grad):
            tensor.fill_(float("nan"))
            tensor[:rows] = torch.randn(rows, *tensor.shape[1:], generator=generator)
        if results is None:
            with recording.recording(monkeypatch):
                options = (plan.tensors(), 0.25, 0.0, sinks)
                out, lse = attention.mixed_attention(q, k, v, *options)
                upstream = (grad, torch.zeros_like(lse))
                grads = attention.mixed_attention_backward(*upstream, q, k, v, out, lse, *options)
                results = [out, lse, *grads]
        else:
            recording.replay()
        exact = [t[:rows].double().requires_grad_() for t in (q, k, v)]
        wide = sinks.double().requires_grad_()
        want, want_lse = rk.mixed_attention(
            *exact, rk.plan_attention(layout, mask), scale=0.25, sinks=wide, return_lse=True, backend="reference"
        )
        expected = [want, want_lse, *torch.autograd.grad(want, [*exact, wide], grad[:rows].double())]
        bounds = [OUTPUT, LSE, *[GRADIENT] * 4]
        for name, got, exactly, bound in zip("out lse q k v sinks".split(), results, expected, bounds):
            used = got if name == "sinks" else got[:rows]
            error = relative_error(used, exactly.detach(), grad[:rows])
            assert error <= bound[torch.float32], (seed, name, error)


@pytest.mark.parametrize("rows", [None, [5, 1]], ids=["decode", "prefill"])
def test_paged_attention(rows, monkeypatch):
    first, second = (
        make_problem(seed, lengths, counts, page=16, dim=16, visible=rows is not None)
        for seed, lengths, counts in ((0, [90, 33], rows), (1, [17, 96], rows and rows[::-1]))
    )
    # One cache and table that are large enough for both.
    room = max(len(problem.args[1]) for problem in (first, second))
    pages = [torch.zeros(room, 16, 2, 16) for _ in range(2)]
    table = torch.zeros(2, 8, dtype=torch.int32)
    q, lengths = torch.zeros_like(first.args[0]), torch.zeros(2, dtype=torch.int32)
    offsets = None if rows is None else torch.zeros(3, dtype=torch.int32)
    indptr = torch.zeros(len(q) + 1, dtype=torch.int32) if rows else None
    ranges = torch.zeros(64, 2, dtype=torch.int32) if rows else None
    recording, results = Recording(), None
    for problem in (first, second, first):
        for buffer, source in zip((q, *pages, lengths), (problem.args[i] for i in (0, 1, 2, 4))):
            buffer[: len(source)] = source
        table[:, : problem.args[3].shape[1]] = problem.args[3]
        if rows:
            offsets.copy_(problem.options["q_offsets"])
            indptr.copy_(problem.options["visible"][0])
            ranges[: len(problem.options["visible"][1])] = problem.options["visible"][1]
        if results is None:
            with recording.recording(monkeypatch):
                options = (0.25, 0.0, -1, -1, None)
                results = paged.paged_attention(q, *pages, table, lengths, offsets, indptr, ranges, *options)
        else:
            recording.replay()
        assert_rows_close(results[0], problem.out, OUTPUT, "out")
        assert_rows_close(results[1], problem.lse, LSE, "lse")


def test_a_graph_of_embed_mixed(monkeypatch):
    """The number of slots is only on the device, so the same launches write a different number."""
    generator = torch.Generator().manual_seed(0)
    table, chunks, w1, w2 = (torch.randn(n, 24, generator=generator) for n in (50, 7, 24, 24))
    ids, slots = torch.zeros(40, dtype=torch.int64), torch.zeros(40, dtype=torch.int32)
    recording, out = Recording(), None
    for count in (3, 7, 0):
        ids.copy_(torch.randint(0, 50, (40,), generator=generator))
        slots.fill_(-1)
        slots[torch.randperm(40, generator=generator)[:count]] = torch.arange(count, dtype=torch.int32)
        args = (ids, table, chunks, slots, w1, None, w2, None, "none", 2.0, None)
        if out is None:
            with recording.recording(monkeypatch):
                out = projection.embed_mixed(*args)
        else:
            recording.replay()
        projected = chunks.double() @ w1.double().T @ w2.double().T
        want = torch.where((slots >= 0)[:, None], projected[slots.clamp_min(0).long()], table.double()[ids] * 2)
        assert relative_error(out, want) <= OUTPUT[torch.float32], count
