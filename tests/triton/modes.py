"""Modes of a Triton test process: interpreter or compiler, a sample of cases or all."""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ALL = os.environ.get("REFRAG_GPU_PROOF") == "all"
