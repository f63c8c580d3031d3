"""Integrations with other frameworks, each of which is needed only by its own module."""
