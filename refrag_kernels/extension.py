"""Load the two compiled modules, and report what they contain.

``_C``, the kernels, has no Python symbols (LibTorch stable ABI), so it is loaded as a torch library, not imported.
``_planner`` is a Python module. Both are loaded on first use: the package imports without them, and reports
what is missing.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType

import torch

NO_CUDA = "nvcc was not found, or REFRAG_KERNELS_CUDA=0, when it was built"


@functools.cache
def load_error() -> str | None:
    """Load ``_C`` once; return None, or why it can't be loaded."""
    path = Path(__file__).parent / "_C.so"
    if not path.exists():
        return f"the extension {path.name} is not built"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        # torch's own message says only which file; the linker's says why.
        return f"the extension {path.name} does not load: {error.__cause__ or error}"
    return None


@functools.cache
def planner() -> ModuleType:
    """Return the module ``_planner``."""
    try:
        return importlib.import_module("refrag_kernels._planner")
    except ImportError as error:
        raise ImportError(f"the extension _planner is not built or does not load: {error}") from error


def cpu_missing() -> str | None:
    """Return why the C++ CPU kernels can't run, or None when they can."""
    return load_error()


def cuda_missing() -> str | None:
    """Return why the CUDA C++ kernels can't run, or None when they can."""
    error = load_error()
    if error is not None:
        return error
    if not torch.ops.refrag_cuda.architectures():
        return f"this build has no CUDA kernels: {NO_CUDA}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None
