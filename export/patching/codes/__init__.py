"""Patch the codes of a quantised base: where a graph holds them, and the merge in their grid.

`find.py` looks for them on a build machine, with the `onnx` package; `places.py` is what travels in
the map, and `rewrite.py` merges on a device, with numpy and numba alone.
"""

from __future__ import annotations
