"""Run Triton's kernels on the CPU, in its interpreter or with ttsem, as the backend "triton" of CPU tensors.

``triton.jit`` reads TRITON_INTERPRET on decoration, so a process has either the interpreter or the compiler.
"""

import dataclasses
import os
import sys

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from refrag_kernels import plan, selection, tile_lists

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TTSEM = "ttsem" in sys.modules  # ``python -m ttsem.sanitize pytest`` runs kernels compiled by Triton
if TTSEM:  # ttsem reports a GPU but can't pin memory
    plan._empty_buffer = lambda words, device: torch.empty(words, dtype=torch.int32)


def plans_have_tile_lists(patch):
    """Give CPU plans the tile lists of GPU kernels."""
    patch.setattr(tile_lists, "wanted", lambda device: True)


def install(patch):
    """Install the backend for the CPU until ``patch``, a pytest.MonkeyPatch, is undone."""
    plans_have_tile_lists(patch)
    here = dataclasses.replace(selection.BACKENDS["triton"], devices=("cpu", "cuda"), why_missing=lambda: None)
    patch.setitem(selection.BACKENDS, "triton", here)
    if INTERPRETED:
        _bfloat16(patch)


def _widen(handle):
    """Convert a bfloat16 handle, which the interpreter stores as integers, to float32."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrow(data):
    """Convert float32 to the bits of bfloat16, rounded to nearest even."""
    bits = np.ascontiguousarray(data, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(data), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _bfloat16(patch):
    """Fix bfloat16 dot products and casts; the interpreter computes on the integers that store them.

    Any other bfloat16 arithmetic raises an error; no kernel uses it.
    """
    builder = interpreter.InterpreterBuilder
    dot, cast, binary = builder.create_dot, builder.cast_impl, builder.binary_op

    def create_dot(self, a, b, d, *options):
        return dot(self, _widen(a), _widen(b), d, *options)

    def cast_impl(self, source, target):
        if source.dtype.scalar == tl.bfloat16 and target.scalar != tl.bfloat16:
            return cast(self, _widen(source), target) if target.scalar != tl.float32 else _widen(source)
        if target.scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
            return interpreter.TensorHandle(_narrow(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, target)

    def binary_op(self, left, right, op):
        assert tl.bfloat16 not in (left.dtype.scalar, right.dtype.scalar), "arithmetic on bfloat16"
        return binary(self, left, right, op)

    patch.setattr(builder, "create_dot", create_dot)
    patch.setattr(builder, "cast_impl", cast_impl)
    patch.setattr(builder, "binary_op", binary_op)
    patch.setattr(builder, "create_fp_to_fp", lambda self, source, target, rounding: self.cast_impl(source, target))
