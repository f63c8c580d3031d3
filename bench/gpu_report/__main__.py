"""Entry point of ``python -m bench.gpu_report``, which bench/gpu_report.sh runs."""

from bench.gpu_report.report import main

if __name__ == "__main__":
    raise SystemExit(main())
