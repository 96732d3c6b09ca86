"""Compute exact integers and the one rounding of the format on a CPU.

Philox bits, sign bases, integer products, ordered float32 sums and the rounding into a tensor's
type, as numba kernels; `reference.py` is the same in plain Python, and `selftest.py` compares a
machine with typed-in values before it merges. Nothing here knows what a delta is.
"""
