"""Measure cases, and write, compare and draw what was measured."""
