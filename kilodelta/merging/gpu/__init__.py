"""Expand and merge on a GPU, bit for bit as on a CPU: Triton kernels, and plain torch operations.

A `Unit` draws factors and adds their product; `choose.py` gives one out only after `selftest.py`
has compared it with known values on the device at hand.
"""
