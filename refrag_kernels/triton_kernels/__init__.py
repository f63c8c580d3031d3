"""Triton kernels for CUDA and ROCm; imported on first use. Not yet measured on a GPU."""
