"""Profile passages, a prompt and decoding with Nsight Compute, to see where their time goes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from bench.gpu_report import cuda_tools, ncu
from bench.gpu_report.block import Options, Results, run

_TARGETS = (
    ("passages", "triton"),
    ("prompt", "triton"),
    ("decode", "triton"),
    ("passages", "cuda"),
    ("decode", "cuda"),
)
_LEAST = 6.0  # approximate seconds per target


def block(options: Options, results: Results) -> None:
    """Profile each target in its own process; on the CPU, run one without a profiler."""
    tool = cuda_tools.find("ncu")
    if options.dry_run:
        _launch_once(["passages", "--device", "cpu"], options)
        results.add("passages", status="skipped", reason="ncu needs a GPU")
        return
    if tool is None:
        results.add("ncu", status="skipped", reason="not installed")
        return
    for call, backend in _TARGETS:
        case = f"{call}, {backend}"
        if options.seconds_left < _LEAST:
            results.add(case, status="skipped", reason="out of time")
            continue
        found, said = _profile(tool, call, backend, options, metrics=True)
        if (
            not found and "metric" in said.lower() and options.seconds_left > _LEAST
        ):  # an unknown metric in this version of ncu
            found, said = _profile(tool, call, backend, options, metrics=False)
        for launch in found:
            results.add(case, **ncu.summary(launch))
            print({name: value for name, value in launch.items() if "__" in name})  # all counters, for the log
        if not found:
            results.add(case, status="failed", reason=said or "ncu wrote no launch")


def _profile(tool: str, call: str, backend: str, options: Options, metrics: bool) -> tuple[list, str]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        words = [sys.executable, "-m", "bench.gpu_report.launch_once", call, "--backend", backend]
        try:
            done = subprocess.run(
                ncu.command(tool, str(log), words, metrics),
                capture_output=True,
                text=True,
                check=False,
                timeout=max(1.0, options.seconds_left),
            )
        except subprocess.TimeoutExpired:
            return [], "out of time"
        text = log.read_text() if log.exists() else ""
    said = ncu.errors(text + "\n" + done.stdout + done.stderr)
    return ncu.launches(text), said or (done.stderr[-300:].strip() if done.returncode else "")


def _launch_once(arguments: list[str], options: Options) -> None:
    words = [sys.executable, "-m", "bench.gpu_report.launch_once", *arguments]
    subprocess.run(words, check=True, timeout=max(1.0, options.seconds_left))


if __name__ == "__main__":
    raise SystemExit(run("counters", block))
