"""Merge updates into a grid tile by tile, one code per byte; `exact.in_bytes` has two.

A tile of a row of the update is computed, as `exact.fused` does, and rounded while it is in the
nearest cache: no array holds the update.
"""

from __future__ import annotations

import numpy as np

from kilodelta.exact.compiled import kernel
from kilodelta.exact.fused import multiply_row
from kilodelta.exact.quotients import (
    LANES,
    ROOM,
    TILE,
    add_magnitudes,
    decide_floats,
    decide_integers,
    fill_ratios,
    fill_zeros,
    float_tile,
    integer_tile,
    magnitude_of_all,
)


@kernel
def _room(whole, columns):  # type: ignore[no-untyped-def]
    return whole[0][:columns], whole[1][:columns], whole[2][:columns], whole[3][:columns]


@kernel
def _round_integers(numbers, factor, codes, start, zeros, steps, row, limits, room, out):  # type: ignore[no-untyped-def]
    values, groups, width, scale, base, _ = steps
    own = groups[start : start + codes.size]
    fill_ratios(values, row, scale, own, width, start, room[0])
    if zeros.size:
        fill_zeros(zeros, row, own, width, start, room[1])
    moved, doubts = integer_tile(numbers, codes, limits, room, out)
    if doubts:
        moved = decide_integers(
            numbers, factor, codes, values, row, own, base, limits, room, moved, out
        )
    return moved


@kernel
def _round_floats(numbers, factor, codes, start, grid, steps, row, room, out):  # type: ignore[no-untyped-def]
    values, groups, width, scale, base, _ = steps
    table, highest, middles, mantissa, sign = grid
    own = groups[start : start + codes.size]
    still = fill_ratios(values, row, scale, own, width, start, room[0])
    moved, doubts = float_tile(numbers, codes, table, highest, mantissa, sign, room, out)
    if doubts or still:
        moved = decide_floats(
            numbers, factor, codes, values, row, own, base, table, middles, sign, room, out
        )
    return moved


@kernel
def round_integers(numbers, factor, codes, first, zeros, steps, limits, every, out):  # type: ignore[no-untyped-def]
    """Round to equally spaced numbers, ties to even multiples of the step.

    Args:
        numbers: dQ, (rows, in), integers of any type that holds them.
        factor: C, float64.
        codes: int8 (rows, in).
        first: which row of the weight the first one is.
        zeros: int16, of the shape of the steps; (0, 0) where all are zero.
        steps: `grid.steps.Steps` of the whole weight.
        limits: of `quotients.integer_limits`.
        every: measure the update in every so many rows only; 1 for all.
        out: int8 (rows, in).

    Returns:
        how many codes changed, and the sum of |delta / step|, roughly.
    """
    changed, sums, whole = 0, np.zeros(LANES), np.zeros((ROOM, TILE), limits.dtype)
    for start in range(0, codes.shape[1], TILE):
        stop = min(start + TILE, codes.shape[1])
        room = _room(whole, stop - start)
        for i in range(codes.shape[0]):
            changed += _round_integers(
                numbers[i][start:stop], factor, codes[i][start:stop], start, zeros, steps,
                (first + i) // steps[5], limits, room, out[i][start:stop],
            )  # fmt: skip
            if i % every == 0:
                add_magnitudes(room[3], sums)
    return changed, magnitude_of_all(sums, codes.shape[0], every)


@kernel
def merge_integers(left, right, factor, codes, first, zeros, steps, limits, every, out):  # type: ignore[no-untyped-def]
    """Round codes plus C left @ right as `round_integers` does.

    Args:
        left: float64 or float32 (rows, K), integers.
        right: of the same type (K, in), integers, contiguous; the type holds all sums of products.
        factor, codes, first, zeros, steps, limits, every, out: as of `round_integers`.

    Returns:
        as `round_integers`.
    """
    changed, sums, whole = 0, np.zeros(LANES), np.zeros((ROOM, TILE), limits.dtype)
    row = np.empty(TILE, right.dtype)
    for start in range(0, codes.shape[1], TILE):
        stop = min(start + TILE, codes.shape[1])
        room, numbers = _room(whole, stop - start), row[: stop - start]
        for i in range(codes.shape[0]):
            multiply_row(left[i], right, start, numbers)
            changed += _round_integers(
                numbers, factor, codes[i][start:stop], start, zeros, steps,
                (first + i) // steps[5], limits, room, out[i][start:stop],
            )  # fmt: skip
            if i % every == 0:
                add_magnitudes(room[3], sums)
    return changed, magnitude_of_all(sums, codes.shape[0], every)


@kernel
def round_floats(numbers, factor, codes, first, grid, steps, every, out):  # type: ignore[no-untyped-def]
    """Round to the numbers of a small float type, ties to the even code, without infinity or NaN.

    Args:
        numbers, factor, first, steps, every: as of `round_integers`.
        codes: uint8 (rows, in).
        grid: `grid.steps.FloatGrid` of the type.
        out: uint8 (rows, in).

    Returns:
        as `round_integers`; a change between -0 and +0 counts as none.
    """
    changed, sums, whole = 0, np.zeros(LANES), np.zeros((ROOM, TILE), np.float32)
    for start in range(0, codes.shape[1], TILE):
        stop = min(start + TILE, codes.shape[1])
        room = _room(whole, stop - start)
        for i in range(codes.shape[0]):
            changed += _round_floats(
                numbers[i][start:stop], factor, codes[i][start:stop], start, grid, steps,
                (first + i) // steps[5], room, out[i][start:stop],
            )  # fmt: skip
            if i % every == 0:
                add_magnitudes(room[3], sums)
    return changed, magnitude_of_all(sums, codes.shape[0], every)


@kernel
def merge_floats(left, right, factor, codes, first, grid, steps, every, out):  # type: ignore[no-untyped-def]
    """Round codes plus C left @ right as `round_floats` does.

    Args:
        left, right: as of `merge_integers`.
        factor, codes, first, grid, steps, every, out: as of `round_floats`.

    Returns:
        as `round_floats`.
    """
    changed, sums, whole = 0, np.zeros(LANES), np.zeros((ROOM, TILE), np.float32)
    row = np.empty(TILE, right.dtype)
    for start in range(0, codes.shape[1], TILE):
        stop = min(start + TILE, codes.shape[1])
        room, numbers = _room(whole, stop - start), row[: stop - start]
        for i in range(codes.shape[0]):
            multiply_row(left[i], right, start, numbers)
            changed += _round_floats(
                numbers, factor, codes[i][start:stop], start, grid, steps,
                (first + i) // steps[5], room, out[i][start:stop],
            )  # fmt: skip
            if i % every == 0:
                add_magnitudes(room[3], sums)
    return changed, magnitude_of_all(sums, codes.shape[0], every)


ROUND = (round_integers, round_floats)
"""The kernels for integers and for small floats, from an update that is at hand."""
MERGE = (merge_integers, merge_floats)
"""The same, from the two factors of an update."""
