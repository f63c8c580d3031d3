"""Benchmarks of the ops against their peers: ``python -m bench run`` from a checkout."""

import os

# Before torch is loaded: its profiler, which counts memory, would tell of each start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
