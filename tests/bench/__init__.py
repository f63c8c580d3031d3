"""The benchmarks and the GPU report."""
