"""Turn a base and a delta into merged bytes and their proof.

`cpu.py` merges one tensor, `gpu/` does the same on CUDA, and `devices.py` chooses between them;
`stacks.py` computes the factors of many targets at once. `build.py` makes a delta of coefficients,
and `proof.py` the digests of its result.
"""
