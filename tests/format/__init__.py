"""Tests of `format`."""
