"""Turn a base and a delta into merged bytes and their proof, on a CPU; in `gpu/`, on CUDA.

`arithmetic.py` merges one tensor, `stacks.py` expands many targets at once, `build.py` makes a
delta out of coefficients and states the digest of its result.
"""
