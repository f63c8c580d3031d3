"""Tests of the benchmarks and the GPU report."""
