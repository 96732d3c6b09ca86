"""Expand and merge on a GPU, bit for bit as on a CPU: Triton kernels, and plain torch operations.

A `Unit` draws factors and adds their product; `sides.py` asks it for the two factors of a target.
`choose.py` hands a unit out only after `selftest.py` has compared it with the CPU on that device.
"""
