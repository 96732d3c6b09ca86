"""Tests of `merging`."""
