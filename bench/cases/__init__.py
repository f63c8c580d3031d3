"""Benchmark cases of each op and of the model, and the peers they are compared with."""
