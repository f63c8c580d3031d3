"""Tests of the vLLM plugin."""
