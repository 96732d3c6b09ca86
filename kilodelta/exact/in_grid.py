"""Merge low-rank updates into a grid row by row, and read the nibbles that its codes lie in.

A row of the update is computed, as `exact.fused` does, and rounded while it is in the nearest
cache: no array holds the update. Numbers and results are those of `exact.nearest`.
"""

from __future__ import annotations

import math

import numpy as np

from kilodelta.exact.compiled import kernel
from kilodelta.exact.fused import multiply_row
from kilodelta.exact.nearest import integer_row, round_floats


@kernel
def merge_integers(left, right, factor, codes, zeros, steps, width, low, high, out):  # type: ignore[no-untyped-def]
    """Round codes plus C left @ right as `nearest.round_integers` does.

    Args:
        left: float64 (rows, K), integers.
        right: float64 (K, in), integers, contiguous; no sum of products reaches 2^53.
        factor, codes, zeros, steps, width, low, high, out: as of `round_integers`.

    Returns:
        as `round_integers`.
    """
    columns = codes.shape[1]
    changed, size, row, room = 0, 0.0, np.empty(columns), np.empty((2, columns))
    for i in range(codes.shape[0]):
        multiply_row(left[i], right, 0, row)
        moved, magnitude = integer_row(
            row, factor, codes[i], zeros[i], steps, i, width, low, high, room, out[i]
        )
        changed += int(moved)
        size += magnitude
    return changed, size


@kernel
def merge_floats(left, right, factor, codes, table, middles, steps, sign, out):  # type: ignore[no-untyped-def]
    """Round codes plus C left @ right as `nearest.round_floats` does.

    Args:
        left, right: as of `merge_integers`.
        factor, codes, table, middles, steps, sign, out: as of `round_floats`.

    Returns:
        as `round_floats`.
    """
    signs, mantissas, shifts, inverses, groups = steps
    numbers = np.empty((1, codes.shape[1]))
    changed, size = 0, 0.0
    for i in range(codes.shape[0]):
        multiply_row(left[i], right, 0, numbers[0])
        own = slice(i, i + 1)
        parts = (signs[own], mantissas[own], shifts[own], inverses[own], groups)
        count, sum_ = round_floats(
            numbers, factor, codes[own], table, middles, parts, sign, out[own]
        )
        changed += count
        size += sum_
    return changed, size


MERGE = (merge_integers, merge_floats)
"""The kernels for integers and for small floats, as `nearest.ROUND`."""


@kernel
def split_steps(steps, base, signs, mantissas, shifts, inverses):  # type: ignore[no-untyped-def]
    """Split steps into sign * M * 2^E with M odd, for the kernels above.

    Args:
        steps: float64 (rows, groups), finite.
        base: what E is taken from: s = base - E.
        signs, mantissas, shifts: int64 of the same shape; filled with the sign (0 of a step of
            zero), M and s.
        inverses: float64, likewise; filled with 2^s / M.

    Returns:
        the largest M.
    """
    largest = np.int64(1)
    for i in range(steps.shape[0]):
        for g in range(steps.shape[1]):
            fraction, exponent = math.frexp(abs(steps[i, g]))
            mantissa, power = np.int64(fraction * 9007199254740992.0), exponent - 53  # 2^53
            if mantissa:
                low = mantissa & -mantissa  # the lowest bit that is set
                mantissa //= low
                power += math.frexp(np.float64(low))[1] - 1
            else:
                mantissa = np.int64(1)
            signs[i, g] = np.int64(steps[i, g] > 0) - np.int64(steps[i, g] < 0)
            mantissas[i, g] = mantissa
            shifts[i, g] = base - power
            inverses[i, g] = math.ldexp(1.0 / np.float64(mantissa), base - power)
            largest = max(largest, mantissa)
    return largest


@kernel
def read_nibbles(stream, offset, out):  # type: ignore[no-untyped-def]
    """Unpack nibbles, the low one of each byte first, less an offset modulo 256.

    Args:
        stream: uint8 (rows, nbytes).
        offset: uint8, such as 8 for codes that are stored plus 8.
        out: uint8 (rows, count), count at most 2 nbytes; nibbles behind are left out.
    """
    rows, count = out.shape
    for i in range(rows):
        packed, codes = stream[i], out[i]
        for j in range(count // 2):
            codes[2 * j] = (packed[j] & np.uint8(15)) - offset
            codes[2 * j + 1] = (packed[j] >> np.uint8(4)) - offset
        if count % 2:
            codes[count - 1] = (packed[count // 2] & np.uint8(15)) - offset
