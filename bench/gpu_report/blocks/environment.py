"""Describe the machine and its limits, check a supplied Triton cache, and time an empty kernel."""

from __future__ import annotations

import dataclasses

import torch

from bench.engine import limits, machine
from bench.engine.timing import Times, interleave
from bench.gpu_report import compilations, l2
from bench.gpu_report.block import Options, Results, run
from refrag_kernels import backends


def block(options: Options, results: Results) -> None:
    """Describe the machine first, then measure, cheapest first."""
    report = dataclasses.asdict(backends.report())
    for case, nothing in (("versions", "not installed"), ("machine", ""), ("backends", "runs"), ("build", "")):
        results.add(case, found={name: str(value or nothing) for name, value in report[case].items()})
    results.add("devices", found=report["devices"], gpu=machine.gpu())
    results.add("libraries", found={name: value or "not installed" for name, value in machine.libraries().items()})
    _triton_cache(options, results)
    rounds = 1 if options.dry_run else 21
    nothing = (lambda: None) if options.dry_run else (lambda: torch.cuda._sleep(0))
    _add(results, "empty kernel", interleave({"empty": nothing}, rounds, device=options.device)["empty"])
    _l2(options, results)
    if options.dry_run:
        return  # limits.matmul_flops and limits.bandwidth take seconds
    results.add("matmul, bfloat16", flop_per_s=limits.matmul_flops(torch.bfloat16, device="cuda"))
    results.add("copy", bytes_per_s=limits.bandwidth(device="cuda"))
    for dtype in (torch.float16, torch.float32):
        if options.seconds_left > 1:
            rate = limits.matmul_flops(dtype, device="cuda")
            results.add(f"matmul, {str(dtype).removeprefix('torch.')}", flop_per_s=rate)


def _triton_cache(options: Options, results: Results) -> None:
    """Launch the forward kernel of passages, which a cache made for this machine's Triton contains."""
    from triton import knobs

    from bench.gpu_report.known_launches import passages

    with compilations.counted() as found:
        if not options.dry_run:
            passages("cuda")()
    results.add("triton cache", folder=knobs.cache.dir, **found.as_values())


def _l2(options: Options, results: Results) -> None:
    """Read a buffer that fits in half of an H100's L2, with two programs per multiprocessor."""
    programs = 2 if options.dry_run else 2 * torch.cuda.get_device_properties(0).multi_processor_count
    call, expected, size = l2.reader(1 << 15 if options.dry_run else 24 << 20, programs, options.device)
    if not torch.equal(call(), expected):
        results.add("L2 read", status="wrong", reason="the sums don't match the buffer's")
        return
    times = interleave({"read": call}, 1 if options.dry_run else 11, device=options.device)["read"]
    _add(results, "L2 read", times, bytes_per_s=size / times.median)


def _add(results: Results, case: str, times: Times, **values: float) -> None:
    results.add(case, median_s=times.median, p20_s=times.quantile(0.2), p80_s=times.quantile(0.8), **values)


if __name__ == "__main__":
    raise SystemExit(run("environment", block))
