"""Tests and measurements that need a GPU, in blocks of seconds; see docs/how-to/gpu-report.md."""
