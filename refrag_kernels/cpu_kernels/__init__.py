"""Bind the C++ CPU kernels of ``_C``: check values, then call."""
