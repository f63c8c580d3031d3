"""Measure cases; write, compare and plot the results."""
