"""Triton's kernels without a GPU."""
