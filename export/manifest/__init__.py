"""Describe exported artefacts as data, and read such a description trusting nothing."""
