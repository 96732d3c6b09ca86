"""Tests of `kilodelta.models`."""
