"""Encodes passages into a store, in this process or on Ray."""
