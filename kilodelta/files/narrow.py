"""bfloat16, float16 and float32 by their names: rounding to them, and reading them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[Any]

TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""numpy's and torch's names to safetensors'."""


def encode(values: Floats, dtype: str) -> Floats:
    """Finite float32 values to the bits of a safetensors type, to nearest even; little-endian."""
    floats = np.ascontiguousarray(values, np.float32)
    if dtype == "F32":
        return floats.astype("<f4")
    if dtype == "F16":
        return floats.astype("<f2")
    bits = floats.view(np.uint32)
    found: Floats = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return found


def decode(data: Floats, dtype: str) -> Floats:
    """The raw bytes of a float tensor as float32, exactly."""
    raw = np.frombuffer(data.tobytes(), {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[dtype])
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


def rounded(values: Floats, dtype: str) -> Floats:
    """Finite float32 values rounded to a type, to nearest even, as float32."""
    return decode(encode(values, dtype), dtype).reshape(values.shape)
