"""Ops that the benchmarks measure: those registered by refrag_kernels, the planner's, and the model's."""

from __future__ import annotations

import refrag_kernels  # noqa: F401  (registers its ops)
from refrag_kernels.support import OPS as _REGISTERED

_FORWARD = [op for op in _REGISTERED.values() if not op.is_backward]

GPU_OPS = tuple(op.name for op in _FORWARD if op.implementations["triton"].support.missing is None)
PLANNER_OPS = ("plan_attention", "visible_ranges")
MODEL_OPS = ("ttft", "decode", "passage_cache", "kv_slots")
KERNEL_OPS = (*(op.name for op in _FORWARD), *PLANNER_OPS)
OPS = (*KERNEL_OPS, *MODEL_OPS)
