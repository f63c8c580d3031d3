"""Benchmarks of the ops against their peers: ``python -m bench run`` from a checkout."""

import os

# Set before torch is imported: its profiler, which counts memory, would otherwise log each start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
