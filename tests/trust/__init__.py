"""Tests of `trust`."""
