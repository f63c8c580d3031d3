"""The CUDA C++ kernels without a GPU: their source on the CPU, and their machine code."""
