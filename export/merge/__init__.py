"""Merge into files or into a loaded model, and prove the result while it is written."""
