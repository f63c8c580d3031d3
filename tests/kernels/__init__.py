"""Tests of refrag_kernels' ops, plans and backends."""
