"""bfloat16 where numpy has none: 16-bit words that are the upper half of a float32."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def pack(values: NDArray[Any]) -> NDArray[np.uint16]:
    """Round to bfloat16, to nearest even, and give the words; NaN stays a quiet NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def unpack(words: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The same numbers as float32, exactly."""
    return (words.astype(np.uint32) << 16).view(np.float32)
