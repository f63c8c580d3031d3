"""Tests of the build, the wheel, the Hub kernel and the report of an installation."""
