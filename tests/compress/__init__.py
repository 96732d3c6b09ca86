"""Tests of `compress`."""
