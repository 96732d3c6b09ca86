"""Exact expansion and merging on a GPU: Triton kernels, and the same in plain torch operations."""
