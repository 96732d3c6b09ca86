"""Tests of `docs` and of the README."""
