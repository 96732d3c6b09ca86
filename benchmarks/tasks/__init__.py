"""The tasks of the real models in `benchmarks/models.py`, one file for each model."""
