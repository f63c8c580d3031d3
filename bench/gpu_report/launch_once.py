"""Launch one call between the profiler's start and stop: ``python -m bench.gpu_report.launch_once CALL``."""

from __future__ import annotations

import argparse

import torch

from bench.gpu_report.known_launches import CALLS


def main() -> int:
    """Call twice, so that everything is compiled, and once more for the profiler."""
    parser = argparse.ArgumentParser("python -m bench.gpu_report.launch_once")
    parser.add_argument("call", choices=list(CALLS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", default="triton")
    options = parser.parse_args()
    how = {"preset": "tiny", "backend": None} if options.device == "cpu" else {"backend": options.backend}
    with torch.inference_mode():
        call = CALLS[options.call](options.device, **how)
        for _ in range(2):
            call()
        if options.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        call()
        if options.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
