"""Tests of the CUDA C++ kernels without a GPU: their source compiled for the CPU, and their machine code."""
