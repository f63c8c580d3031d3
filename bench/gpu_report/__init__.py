"""What only a GPU can tell, in blocks of seconds; see docs/how-to/gpu-report.md."""
