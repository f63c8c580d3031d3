"""Bind the C++ CPU kernels of ``_C``."""
