"""The process that children are forked from: what it imports, each module for its effect.

In this order: `loading` (collect no garbage meanwhile), `lean` (numba without scipy), the libraries
that the tasks need, `warm` (kernels loaded and proved), and where many children follow `joined`
(memory in huge pages). `processes.py` names them; `start` starts processes, which run `serve`.
"""
