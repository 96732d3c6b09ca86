"""Prove and measure kilodelta on a GPU machine: `python -m kilodelta.verify.gpu -o report/`.

`exact.py`, `parity.py` and `speed.py` are its three parts, each a generator of rows; `machine.py`
runs them and writes the report. `speed.py` and `training.py` live here and not in `benchmarks/`,
because the command takes their measurements wherever the package is installed.
"""
