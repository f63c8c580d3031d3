"""Compare the launch order of attention programs: tiles first (the previous order) and heads first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch

import refrag_kernels as rk
from bench.cases import peers
from bench.cases.attention import tensors
from bench.cases.prompts import Passages, Prompt
from bench.engine.case import bound_of
from bench.engine.timing import Times, interleave
from bench.gpu_report import l2
from bench.gpu_report.block import Options, Results, run
from bench.gpu_report.contest import contest
from refrag_kernels import extension, grid_order, tile_lists
from refrag_kernels.grid_order import TILES_FIRST, Order

_GROUPED, _OWN = (32, 8), (32, 32)  # query heads, and key/value heads
_LEAST = 2.5  # approximate seconds per case, including compilation
_ROUNDS = 31


def block(options: Options, results: Results) -> None:
    """Compare orders on the same plan, the most decisive cases first."""
    _rates(options, results)
    tiny = options.dry_run
    passages = Passages(160, 16, 0.66) if tiny else Passages(4096, 16, 0.12)
    prompt = rk.ChunkLayout.from_lengths([[20, 20]]) if tiny else Prompt(4096, 16, 0.0).layout()
    heads = ((4, 2),) if tiny else (_GROUPED, _OWN)
    cases: list[Callable[[], None]] = []
    cases += [lambda of=of: _passages(passages, of, options, results) for of in heads]
    cases += [lambda: _causal("prompt", prompt, heads[0], options, results)]
    for rows in (48,) if tiny else (4096, 1024):
        layout = rk.ChunkLayout.from_lengths([[rows]])
        cases += [lambda of=of, layout=layout: _causal("causal", layout, of, options, results) for of in heads]
    cases += [lambda: _backward(passages, heads[0], options, results)]
    with _tile_lists(options), torch.no_grad():
        for case in cases:
            if options.seconds_left > _LEAST or tiny:
                case()


@contextlib.contextmanager
def _tile_lists(options: Options) -> Iterator[None]:
    """Give CPU plans the tile lists of GPU kernels, in a dry run."""
    if not options.dry_run:
        yield
        return
    with mock.patch.object(tile_lists, "wanted", lambda device: True):
        yield


def _rates(options: Options, results: Results) -> None:
    """Measure the lower bounds of the times below: an empty kernel, and L2 reads."""
    programs = 2 if options.dry_run else 2 * torch.cuda.get_device_properties(0).multi_processor_count
    read, expected, size = l2.reader(1 << 15 if options.dry_run else 24 << 20, programs, options.device)
    nothing: Callable[[], object] = (lambda: None) if options.dry_run else (lambda: torch.cuda._sleep(0))
    if not torch.equal(read(), expected):
        results.add("L2 read", status="wrong", reason="the sums don't match the buffer's")
        return
    calls = {"empty kernel": nothing, "L2 read": read}
    times = interleave(calls, *((1, 0) if options.dry_run else (11, 2)), device=options.device)
    for name, took in times.items():
        rate = {"bytes_per_s": size / took.median} if name == "L2 read" else {}
        results.add(name, median_s=took.median, p20_s=took.quantile(0.2), p80_s=took.quantile(0.8), **rate)


def _inputs(heads: tuple[int, int], rows: int, options: Options) -> list[torch.Tensor]:
    # The interpreter doesn't support bfloat16.
    dtype = torch.float16 if options.dry_run else torch.bfloat16
    return tensors(*heads, 16 if options.dry_run else 128, rows, dtype, options.device)


def _orders(k: torch.Tensor, options: Options) -> dict[str, Order]:
    """Return the distinct orders to compare, by name."""
    heads, chosen = k.shape[1], grid_order.order_of(k)
    if options.dry_run:
        chosen = Order(1, 3)
    named = {
        "tiles first": TILES_FIRST,
        "a wave of all heads, then sections": chosen,
        "all heads": Order(heads, 0),
        "sections": Order(chosen.section, 0),
    }
    first = {order: name for name, order in reversed(named.items())}
    return {name: order for order, name in reversed(first.items())}


def _by(order: Order, call: Callable[[], object]) -> Callable[[], object]:
    def ordered() -> object:
        with grid_order.use(order):
            return call()

    return ordered


def _passages(passages: Passages, heads: tuple[int, int], options: Options, results: Results) -> None:
    q, k, v = _inputs(heads, passages.rows, options)
    expected = peers.sdpa_float64(q, k, v, passages.dense().to(q.device))()
    case = f"passages, {passages.density:.0%} of {passages.rows} rows, {heads[0]}/{heads[1]} heads"
    _forward(case, passages.plan(options.device), (q, k, v), expected, {}, options, results)


def _causal(name: str, layout: rk.ChunkLayout, heads: tuple[int, int], options: Options, results: Results) -> None:
    q, k, v = _inputs(heads, layout.total_rows, options)
    expected = peers.sdpa_float64(q, k, v, is_causal=True)()
    plan = rk.plan_attention(layout, device=options.device)
    others = {"SDPA": peers.sdpa(q, k, v, is_causal=True)}
    case = f"{name}, {layout.total_rows} rows, {heads[0]}/{heads[1]} heads"
    _forward(case, plan, (q, k, v), expected, others, options, results)


def _forward(case, plan, inputs, expected, others, options: Options, results: Results) -> None:
    q, k, v = inputs
    tensors_of_plan, scale = plan.tensors(), q.shape[2] ** -0.5
    orders = _orders(k, options)
    calls: dict[str, Callable[[], object]] = {}
    said: dict[str, dict[str, object]] = {}
    for backend, attend in _backends(options).items():
        call = lambda attend=attend: attend(q, k, v, tensors_of_plan, scale, 0.0, None)[0]  # noqa: E731
        for name, order in orders.items() if backend == "triton" else list(orders.items())[:2]:
            calls[f"{backend}, {name}"] = _by(order, call)
            said[f"{backend}, {name}"] = {"section": order.section, "ahead": order.ahead}
    flops = 4.0 * q.shape[1] * q.shape[2] * plan.stats()["pairs_allowed"]
    contest(
        case, {**calls, **others}, expected, bound_of(q.dtype), options, results, rounds=_ROUNDS,
        values=lambda times: _tflops(flops, times), said=said,
    )  # fmt: skip


def _backends(options: Options) -> dict[str, Callable]:
    from refrag_kernels.cuda_kernels import attention as cuda
    from refrag_kernels.triton_kernels import attention as triton

    found: dict[str, Callable] = {"triton": triton.mixed_attention}
    if not options.dry_run and extension.cuda_missing() is None:
        found["cuda"] = cuda.mixed_attention
    return found


def _tflops(flops: float, times: Times) -> dict[str, float]:
    return {"tflops": flops * 1e-12 / times.median}


def _backward(passages: Passages, heads: tuple[int, int], options: Options, results: Results) -> None:
    from refrag_kernels.triton_kernels import attention

    q, k, v = _inputs(heads, passages.rows, options)
    plan, scale, grad = passages.plan(options.device), q.shape[2] ** -0.5, q.flip(0).contiguous()
    with torch.enable_grad():
        wide = [t.double().requires_grad_() for t in (q, k, v)]
        out = peers.sdpa(*wide, passages.dense().to(q.device))()
        expected = torch.autograd.grad(out, wide, grad.double())
    out, lse = attention.mixed_attention(q, k, v, plan.tensors(), scale, 0.0, None)
    no_grad = torch.zeros_like(lse)

    def call() -> tuple[torch.Tensor, ...]:
        return attention.mixed_attention_backward(
            grad, no_grad, q, k, v, out, lse, plan.tensors(), scale, 0.0, None
        )[:3]  # fmt: skip

    orders = dict(list(_orders(k, options).items())[:2])
    flops = 10.0 * q.shape[1] * q.shape[2] * plan.stats()["pairs_allowed"]
    contest(
        f"backward of passages, {heads[0]}/{heads[1]} heads",
        {f"triton, {name}": _by(order, call) for name, order in orders.items()},
        expected, 8e-3, options, results, rounds=_ROUNDS, values=lambda times: _tflops(flops, times),
        said={f"triton, {name}": {"section": order.section, "ahead": order.ahead} for name, order in orders.items()},
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(run("grid_order", block))
