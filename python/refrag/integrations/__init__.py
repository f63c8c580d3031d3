"""Integrations with other frameworks. Each module requires only its own framework."""
