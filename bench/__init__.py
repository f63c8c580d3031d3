"""Benchmarks of the ops against their peers: ``python -m bench run`` from a checkout."""
