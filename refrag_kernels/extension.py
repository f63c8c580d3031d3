"""Load ``_C``, the compiled kernels, and tell what it holds.

``_C`` has no Python symbols (LibTorch stable ABI), so it is loaded as a torch library, not imported.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch


@functools.cache
def load_error() -> str | None:
    """Load ``_C`` once; return None, or why it can't be loaded."""
    path = Path(__file__).parent / "_C.so"
    if not path.exists():
        return f"the extension {path.name} is not built"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the extension {path.name} does not load: {error}"
    return None


def cpu_missing() -> str | None:
    """Return why the C++ CPU kernels can't run, or None when they can."""
    return load_error()


def cuda_missing() -> str | None:
    """Return why the CUDA C++ kernels can't run, or None when they can."""
    error = load_error()
    if error is not None:
        return error
    if not torch._C._dispatch_has_kernel_for_dispatch_key("refrag_cuda::pool_chunks", "CUDA"):
        return "this build has no CUDA kernels: nvcc was not found, or REFRAG_KERNELS_CUDA=0, when it was built"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None
