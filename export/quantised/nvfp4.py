"""Take the scales of NVFP4 apart again: E4M3 numbers, times one number for the whole weight.

Source: NVIDIA's NVFP4 recipe, as TensorRT reads it from ONNX: one `DequantizeLinear` makes the
scales of blocks from E4M3 codes and one float, another makes weights from E2M1 codes and these.
A matrix in memory has the products alone (`Matrix.steps`), whatever its layout called the factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, log2

import numpy as np
import numpy.typing as npt

from kilodelta.grid.codes import E4M3, e4m3_values
from kilodelta.grid.matrix import Floats
from kilodelta.grid.precisions import nearest_codes

_ODD = (1, 3, 5, 7, 9, 11, 13, 15)
"""E4M3 numbers are these times powers of two: they have four significant bits."""
_LARGEST, _TRIES = 448.0, 18
"""The largest E4M3 number, and how many binary orders of them there are."""


def scale_pairs(steps: Floats) -> Iterator[tuple[npt.NDArray[np.uint8], float]]:
    """Yield the ways to write steps as E4M3 codes times one number, exactly.

    Args:
        steps: float64, not negative.

    Example:
        >>> codes, whole = next(scale_pairs(np.array([[0.375, 3.0]])))
        >>> codes.tolist(), whole
        ([[96, 120]], 0.01171875)
        >>> list(scale_pairs(np.array([[1.0, 1.0 + 2.0**-20]])))
        []
    """
    top = float(steps.max(initial=0.0))
    if not top:
        yield np.zeros(steps.shape, np.uint8), 1.0
        return
    for odd in _ODD:
        one = top / odd
        if one * odd != top:
            continue
        least = 2.0 ** ceil(log2(odd / _LARGEST))  # under which the largest is below 448
        for order in range(_TRIES):
            factor = one * least * 2.0**order
            codes = nearest_codes(E4M3, steps / factor)
            if np.array_equal(e4m3_values(codes) * factor, steps):
                yield codes, factor
