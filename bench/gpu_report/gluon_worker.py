"""Compile the Gluon kernel, or check and time it; prints a JSON line per result for ``blocks.gluon``."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

import torch

import refrag_kernels as rk
from bench.cases import peers
from bench.engine.case import bound_of, error_of
from bench.engine.timing import interleave
from bench.gpu_report.gluon_cases import CHECKS, CONFIGS, TIMED, TINY, Problem, config_named, expected, runner
from refrag_kernels.triton_kernels import attention_hopper

_LSE_BOUND = 5e-6
_REPEATS = 20  # launches whose results must be bitwise equal
_ROUNDS = 15


def _write(**values) -> None:
    print(json.dumps(values), flush=True)


def compile_kernels(names: Sequence[str], device: str) -> None:
    """Compile configurations into Triton's cache."""
    for name in names:
        config = config_named(name)
        group = next(group for group, configs in CONFIGS.items() if name in configs)
        problem = Problem("256 rows", 256, (group, 1), causal=config.masks)
        q, k, v = problem.tensors(device)
        work = attention_hopper.divide(problem.plan(device), *problem.heads, config=config)
        lse = torch.empty(q.shape[:2], device=device)
        kernel, arguments, options = attention_hopper.launch_arguments(q, k, v, torch.empty_like(q), lse, work, 0.1)
        start = time.perf_counter()
        kernel.warmup(**arguments, grid=(1,), **options)
        _write(compiled=name, seconds=round(time.perf_counter() - start, 2))


def check(names: Sequence[str], device: str) -> list[str]:
    """Check each configuration on a small problem against float64 and for repeatability; return the correct ones."""
    all_right = []
    for name in names:
        problem = CHECKS[name] if device == "cuda" else TINY
        _write(begin=name, checks=True)
        start = time.perf_counter()
        plan, tensors = problem.plan(device), problem.tensors(device)
        call = runner(problem, config_named(name), plan, tensors)
        first = [result.clone() for result in call()]
        want = expected(problem, tensors, range(problem.heads[0]))
        errors = [error_of(*pair) for pair in zip(first, want)]
        repeats = _REPEATS if device == "cuda" else 1
        equal = all(torch.equal(a, b) for _ in range(repeats) for a, b in zip(call(), first))
        right = errors[0] <= bound_of(torch.bfloat16) and errors[1] <= _LSE_BOUND and equal
        all_right += [name] if right else []
        _write(
            case=f"check, {problem.name}, {problem.heads[0]}/{problem.heads[1]} heads", config=name, right=right,
            error=_finite(errors[0]), lse_error=_finite(errors[1]), repeats_equal=equal,
            seconds=round(time.perf_counter() - start, 2),
        )  # fmt: skip
    return all_right


def _finite(error: float) -> float | None:
    return error if error < float("inf") else None


def measure(names: Sequence[str], device: str, end: float) -> None:
    """Time configurations, the Triton kernel and, without a mask, torch's attention, round-robin."""
    for problem in TIMED if device == "cuda" else (TINY,):
        if time.monotonic() > end - 3 and device == "cuda":
            return
        title = f"{problem.name}, {problem.heads[0]}/{problem.heads[1]} heads"
        _write(begin=title, checks=False)
        with torch.inference_mode():
            _measure(problem, title, names, device)
        if device == "cuda":
            torch.cuda.empty_cache()


def _measure(problem: Problem, title: str, names: Sequence[str], device: str) -> None:
    plan, (q, k, v) = problem.plan(device), problem.tensors(device)
    calls = {}
    for name in (name for name in names if name in CONFIGS[problem.group]):
        try:
            kernel = runner(problem, config_named(name), plan, (q, k, v))
        except ValueError as error:
            _write(case=title, contender=f"gluon, {name}", reason=str(error))
            continue
        calls[f"gluon, {name}"] = lambda kernel=kernel: kernel()[0]
    backend = "triton" if device == "cuda" else None
    calls["refrag_kernels" if backend is None else backend] = lambda: rk.mixed_attention(q, k, v, plan, backend=backend)
    if problem.dense:
        calls["SDPA"] = peers.sdpa(q, k, v, is_causal=problem.causal)
    heads = [0, problem.heads[0] - 1]
    want, _ = expected(problem, (q, k, v), heads)
    errors = {}
    for name, call in list(calls.items()):
        errors[name] = error_of(call()[:, heads], want)
        if not errors[name] <= bound_of(torch.bfloat16):
            _write(case=title, contender=name, error=_finite(errors[name]), reason="wrong")
            del calls[name]
    times = interleave(calls, _ROUNDS if device == "cuda" else 1, 2 if device == "cuda" else 0, device)
    flops = 4 * problem.pairs() * problem.heads[0] * q.shape[2]
    for name, timed in times.items():
        _write(
            case=title, contender=name, error=errors[name], median_s=timed.median, p20_s=timed.quantile(0.2),
            p80_s=timed.quantile(0.8), tflops=flops / timed.median / 1e12,
        )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--compile", nargs=2, type=int, metavar=("PART", "PARTS"), help="compile one part of PARTS and exit"
    )
    parser.add_argument("--first", type=int, default=0, help="number of checks to skip")
    parser.add_argument("--right", nargs="*", default=[], help="configurations known to be correct")
    parser.add_argument("--seconds", type=float, default=60.0, help="start no further problem after this time")
    given = parser.parse_args(arguments)
    end = time.monotonic() + given.seconds
    if given.compile:
        part, parts = given.compile
        compile_kernels(list(CHECKS)[part::parts], given.device)
        return 0
    names = list(CHECKS) if given.device == "cuda" else list(CHECKS)[:1]
    measure([*given.right, *check(names[given.first :], given.device)], given.device, end)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
