"""Find and time the kernels of torch's attention for causal prompts, and time the first call of a new shape."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import refrag_kernels as rk
from bench.cases import peers
from bench.cases.attention import tensors
from bench.engine.case import bound_of, error_of
from bench.engine.timing import interleave
from bench.gpu_report.block import Options, Results, run

_BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_ROWS = (376, 1024, 4096)
_HEADS = ((32, 8), (32, 32))  # LLaMA-3-8B's, LLaMA-2-7B's


def block(options: Options, results: Results) -> None:
    """Compare backends case by case; the cost of a new shape comes before the longest case."""
    if options.dry_run:
        _compare(options, results, 40, (4, 2), 16)
        return
    for number, rows in enumerate(_ROWS):
        for heads in _HEADS:
            if options.seconds_left > 1.5:
                _compare(options, results, rows, heads, 128)
        if number == 0:
            _new_shapes(results)


def _compare(options: Options, results: Results, rows: int, heads: tuple[int, int], head_dim: int) -> None:
    dtype = torch.float32 if options.dry_run else torch.bfloat16
    q, k, v = tensors(*heads, head_dim, rows, dtype, options.device)
    plan = rk.plan_attention(rk.ChunkLayout.from_lengths([[rows]]), device=options.device)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "torch's choice": peers.sdpa(q, k, v, is_causal=True),
        "refrag_kernels": lambda: rk.mixed_attention(q, k, v, plan),
    }
    if not options.dry_run:
        calls |= {name: _forced(backend, calls["torch's choice"]) for name, backend in _BACKENDS.items()}
        calls |= {"aten flash op with lse": _flash(q, k, v), "aten cuDNN op with lse": _cudnn(q, k, v)}
    case = f"causal, {rows} rows, {heads[0]}/{heads[1]} heads"
    pairs = plan.stats()["pairs_allowed"]
    with torch.inference_mode():
        expected = peers.sdpa_float64(q, k, v, is_causal=True)()
        right, errors, kernels = {}, {}, {}
        for name, call in calls.items():
            try:
                errors[name] = error_of(call(), expected)
            except RuntimeError as error:
                results.add(case, who=name, status="skipped", reason=str(error).partition("\n")[0][:300])
                continue
            if errors[name] > 4 * bound_of(dtype):
                results.add(case, who=name, status="wrong", error=_finite(errors[name]), reason="differs from float64")
                continue
            right[name], kernels[name] = call, [] if options.dry_run else _kernels(call)
        times = interleave(right, 1 if options.dry_run else 11, device=options.device)
    for name, took in times.items():
        results.add(
            case,
            who=name,
            median_s=took.median,
            p20_s=took.quantile(0.2),
            p80_s=took.quantile(0.8),
            tflops=4e-12 * heads[0] * head_dim * pairs / took.median,
            error=errors[name],
            kernels=kernels[name],
        )


def _new_shapes(results: Results) -> None:
    """Time the first and later calls of shapes new to torch, on the host until the GPU is done."""
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        first, later = [], []
        for rows in (381, 393, 407):
            call = _forced(backend, peers.sdpa(*tensors(32, 8, 128, rows, torch.bfloat16, "cuda"), is_causal=True))
            try:
                took = [_waited(call) for _ in range(5)]
            except RuntimeError as error:
                results.add(f"a new shape, {name}", status="skipped", reason=str(error).partition("\n")[0][:300])
                break
            first.append(took[0])
            later.append(statistics.median(took[1:]))
        else:
            results.add(f"a new shape, {name}", first_s=statistics.median(first), later_s=statistics.median(later))


def _waited(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _forced(backend: SDPBackend, call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    def forced() -> torch.Tensor:
        with sdpa_kernel(backend):
            return call()

    return forced


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], torch.Tensor]:
    batch = [peers.batched(t) for t in (q, k, v)]
    op = torch.ops.aten._scaled_dot_product_flash_attention
    return lambda: op(*batch, 0.0, True)[0][0].transpose(0, 1)


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], torch.Tensor]:
    batch = [peers.batched(t) for t in (q, k, v)]
    op = torch.ops.aten._scaled_dot_product_cudnn_attention
    return lambda: op(*batch, None, True, 0.0, True)[0][0].transpose(0, 1)


def _kernels(call: Callable[[], object]) -> list[str]:
    """Return the names of the kernels that a call launches."""
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
        found = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    except RuntimeError as error:  # if profiling counters need administrator rights
        return [f"not known: {str(error).partition(chr(10))[0]}"]
    return [name[:160] for name in found]


def _finite(error: float) -> float | None:
    return error if error < float("inf") else None


if __name__ == "__main__":
    raise SystemExit(run("sdpa", block))
