"""Analyze the GPU kernels without running them: resources, work, and models of their time."""
