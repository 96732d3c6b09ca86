"""Prove and measure kilodelta on a GPU machine: `python -m kilodelta.verify.gpu -o report/`."""
