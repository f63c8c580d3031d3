"""What a process of the Triton tests runs: the interpreter or the compiler, a few cases or all of them."""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ALL = os.environ.get("REFRAG_GPU_PROOF") == "all"
