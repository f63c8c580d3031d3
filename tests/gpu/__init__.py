"""Tests of the ops on a GPU."""
