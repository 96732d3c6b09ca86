"""Patch TensorRT-RTX engines: where an engine keeps each weight, measured by building it again.

`map.py` makes the map from builds, `build.py` builds an engine with other weights, `twin.py` makes
the values that are looked for, and `places.py` looks for them and writes others there.
"""
