"""Bind the CUDA C++ kernels of ``_C``."""
