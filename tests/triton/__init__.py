"""Tests of Triton's kernels without a GPU."""
