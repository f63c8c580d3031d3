"""Shared code of the tests: problem generators, accuracy measures, and stand-ins for missing hardware."""
