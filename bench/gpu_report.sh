#!/usr/bin/env bash
# Runs tests and benchmarks on a machine with a GPU in less than 9 minutes; see docs/how-to/gpu-report.md.
# PYTHON: the interpreter; defaults to .venv's if it exists (`make test` creates it), else python3.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
exec "$PYTHON" -m bench.gpu_report "$@"
