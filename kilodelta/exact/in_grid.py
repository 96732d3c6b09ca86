"""Merge updates into a grid row by row, and read and write the nibbles that its codes lie in.

A row of the update is computed, as `exact.fused` does, and rounded while it is in the nearest
cache: no array holds the update.
"""

from __future__ import annotations

import numpy as np

from kilodelta.exact.compiled import kernel
from kilodelta.exact.fused import multiply_row
from kilodelta.exact.quotients import (
    ROOM,
    decide_floats,
    decide_integers,
    fill_ratios,
    fill_zeros,
    float_row,
    integer_row,
    magnitude,
)


@kernel
def _round_integers(numbers, factor, codes, zeros, steps, row, limits, room, out):  # type: ignore[no-untyped-def]
    values, groups, width, scale, base, _ = steps
    fill_ratios(values, row, scale, groups, width, room[0])
    if zeros.size:
        fill_zeros(zeros, row, groups, width, room[1])
    moved, doubts = integer_row(numbers, codes, limits, room, out)
    if doubts:
        moved = decide_integers(
            numbers, factor, codes, values, row, groups, base, limits, room, out
        )
    return moved, magnitude(room[3])


@kernel
def _round_floats(numbers, factor, codes, grid, steps, row, room, out):  # type: ignore[no-untyped-def]
    values, groups, width, scale, base, _ = steps
    table, highest, middles, mantissa, sign = grid
    still = fill_ratios(values, row, scale, groups, width, room[0])
    moved, doubts = float_row(numbers, codes, table, highest, mantissa, sign, room, out)
    if doubts or still:
        moved = decide_floats(
            numbers, factor, codes, values, row, groups, base, table, middles, sign, room, out
        )
    return moved, magnitude(room[3])


@kernel
def round_integers(numbers, factor, codes, first, zeros, steps, limits, out):  # type: ignore[no-untyped-def]
    """Round to equally spaced numbers, ties to even multiples of the step.

    Args:
        numbers: dQ, (rows, in), integers of any type that holds them.
        factor: C, float64.
        codes: int8 (rows, in).
        first: which row of the weight the first one is.
        zeros: int16, of the shape of the steps; (0, 0) where all are zero.
        steps: `grid.steps.Steps` of the whole weight.
        limits: of `quotients.integer_limits`.
        out: int8 (rows, in).

    Returns:
        how many codes changed, and the sum of |delta / step|, roughly.
    """
    changed, size, room = 0, 0.0, np.zeros((ROOM, codes.shape[1]), limits.dtype)
    for i in range(codes.shape[0]):
        row = (first + i) // steps[5]
        moved, sum_ = _round_integers(
            numbers[i], factor, codes[i], zeros, steps, row, limits, room, out[i]
        )
        changed += moved
        size += sum_
    return changed, size


@kernel
def merge_integers(left, right, factor, codes, first, zeros, steps, limits, out):  # type: ignore[no-untyped-def]
    """Round codes plus C left @ right as `round_integers` does.

    Args:
        left: float64 or float32 (rows, K), integers.
        right: of the same type (K, in), integers, contiguous; the type holds all sums of products.
        factor, codes, first, zeros, steps, limits, out: as of `round_integers`.

    Returns:
        as `round_integers`.
    """
    changed, size, room = 0, 0.0, np.zeros((ROOM, codes.shape[1]), limits.dtype)
    numbers = np.empty(codes.shape[1], right.dtype)
    for i in range(codes.shape[0]):
        multiply_row(left[i], right, 0, numbers)
        row = (first + i) // steps[5]
        moved, sum_ = _round_integers(
            numbers, factor, codes[i], zeros, steps, row, limits, room, out[i]
        )
        changed += moved
        size += sum_
    return changed, size


@kernel
def round_floats(numbers, factor, codes, first, grid, steps, out):  # type: ignore[no-untyped-def]
    """Round to the numbers of a small float type, ties to the even code, without infinity or NaN.

    Args:
        numbers, factor, first, steps: as of `round_integers`.
        codes: uint8 (rows, in).
        grid: `grid.steps.FloatGrid` of the type.
        out: uint8 (rows, in).

    Returns:
        as `round_integers`; a change between -0 and +0 counts as none.
    """
    changed, size, room = 0, 0.0, np.zeros((ROOM, codes.shape[1]), np.float32)
    for i in range(codes.shape[0]):
        row = (first + i) // steps[5]
        moved, sum_ = _round_floats(numbers[i], factor, codes[i], grid, steps, row, room, out[i])
        changed += moved
        size += sum_
    return changed, size


@kernel
def merge_floats(left, right, factor, codes, first, grid, steps, out):  # type: ignore[no-untyped-def]
    """Round codes plus C left @ right as `round_floats` does.

    Args:
        left, right: as of `merge_integers`.
        factor, codes, first, grid, steps, out: as of `round_floats`.

    Returns:
        as `round_floats`.
    """
    changed, size, room = 0, 0.0, np.zeros((ROOM, codes.shape[1]), np.float32)
    numbers = np.empty(codes.shape[1], right.dtype)
    for i in range(codes.shape[0]):
        multiply_row(left[i], right, 0, numbers)
        row = (first + i) // steps[5]
        moved, sum_ = _round_floats(numbers, factor, codes[i], grid, steps, row, room, out[i])
        changed += moved
        size += sum_
    return changed, size


ROUND = (round_integers, round_floats)
"""The kernels for integers and for small floats, from an update that is at hand."""
MERGE = (merge_integers, merge_floats)
"""The same, from the two factors of an update."""


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


@kernel
def write_nibbles(codes, offset, out):  # type: ignore[no-untyped-def]
    """Pack codes as `read_nibbles` reads them; only the last four bits of the sums count.

    Args:
        codes: uint8 (rows, count), count even.
        offset: uint8, added to each code modulo 256.
        out: uint8 (rows, count / 2).
    """
    for i in range(codes.shape[0]):
        row, packed = codes[i], out[i]
        for j in range(packed.size):
            low = (row[2 * j] + offset) & np.uint8(15)
            packed[j] = low | ((row[2 * j + 1] + offset) << np.uint8(4))
