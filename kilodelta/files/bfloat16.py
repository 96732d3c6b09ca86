"""bfloat16 where numpy has none: 16-bit words that are the upper half of a float32."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_QUIET_NAN = np.uint16(0x7FC0)


def pack(values: NDArray[Any]) -> NDArray[np.uint16]:
    """Round to bfloat16, to nearest even, and give the words; NaN becomes the one quiet NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), _QUIET_NAN, rounded)


def unpack(words: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The same numbers as float32, exactly."""
    return (words.astype(np.uint32) << 16).view(np.float32)
