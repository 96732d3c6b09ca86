"""Round tiles of updated weights to their grids by short float quotients with a proven error bound.

With r = C 2^(e - unit) / step, the updated weight is v + dQ r in units of the grid. A vector unit
computes it in a float type of unit roundoff u (2^-24, or 2^-53); where that is nearer to a midpoint
of the grid than its error can be, `exact.nearest` decides. So the codes are the exact ones.

**The bound.** Roundings are of r to float64 and to the type, of dQ to the type, of their product
and of the sum: to first order

    |error| <= 3 u |dQ r| + u |x| <= u (4 |x| + 3 |v|)        as |dQ r| <= |x| + |v|

and `u 8 (|x| + |v|)` is more than that with all its terms of higher order, and with r rounded to
float64 first. Quotients below the type's smallest normal number are off by less than 2^-90, and
differ from zero by no more than that.

- Equally spaced numbers: with V = max |v| over all codes, a result that is not clamped has
  |x| <= V + 1, so `u 8 (2 V + 1)` bounds every error that matters (`certain`).
- Small floats: the spacing of the numbers grows with x, so the bound is taken of each weight.

A ratio beyond 2^20 is cut to 2^20: then any dQ but zero leads out of the grid, on its side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kilodelta.exact.compiled import kernel
from kilodelta.exact.nearest import nearest_float, nearest_integer

LIMIT = 1048576.0
"""2^20, what ratios are cut to; every |v| is smaller."""
NARROW = 64
"""The largest |v| up to which float32 is used: it leaves one weight in 8000 in doubt there."""
ROOM = 4
"""Rows of a kernel's own memory: ratios, what is subtracted, values of codes, quotients."""
TILE = 512
"""Columns at a time: all that is read and written of them stays in the nearest cache."""
LANES = 32
"""Columns that are searched for doubts, or added to sums of magnitudes, side by side."""

_UNIT = 2.0**-24
_ERROR = np.float32(8 * _UNIT)
_MAGIC = np.float32(1.5 * 2.0**23)
"""Added to a float32 below 2^22 and taken off again, it rounds to the nearest integer, ties to
even: a vector unit does that at once."""
_EXPONENT = np.uint32(0x7F800000)
_HALF, _ONE, _ZERO = np.float32(0.5), np.float32(1), np.float32(0)


def integer_limits(low: int, high: int, most: int) -> npt.NDArray[Any]:
    """Return what `integer_tile` needs to know of a grid of integers, float32 or float64 (4,).

    Args:
        low, high: what codes are clamped to.
        most: the largest |code - zero point|, below 2^17.

    Returns:
        low, high, the distance to the nearest integer up to which a quotient is certain, and what
        rounds a number of this type to an integer when it is added. The type is that of the
        quotients.
    """
    dtype: Any = np.float32
    unit, magic = _UNIT, float(_MAGIC)
    if most > NARROW:
        dtype, unit, magic = np.float64, 2.0**-53, 1.5 * 2.0**52
    certain = 0.5 - unit * 8 * (2 * most + 1)
    # rounded towards zero, which is the safe side
    return np.array([low, high, np.nextafter(dtype(certain), dtype(0)), magic], dtype)


@kernel
def fill_ratios(steps, row, scale, groups, width, start, out):  # type: ignore[no-untyped-def]
    """Compute r for each column of a tile of a row; 0 where the step is 0.

    Args:
        steps: float64 (rows, groups).
        row: which of them.
        scale: C 2^(e - unit), float64.
        groups: the group of each column of the tile, int64 (n,).
        width: columns of a group, where each group is that many neighbours; 0 for any order.
        start: the tile's first column.
        out: (n,), of the type of the quotients.

    Returns:
        whether a step is 0.
    """
    still, j = False, 0
    while j < out.size:
        g = groups[j]
        step = steps[row, g]
        still |= step == 0.0
        ratio = scale / step if step != 0.0 else 0.0
        stop = min(out.size, (g + 1) * width - start) if width else j + 1
        out[j:stop] = min(max(ratio, -LIMIT), LIMIT)
        j = stop
    return still


@kernel
def fill_zeros(zeros, row, groups, width, start, out):  # type: ignore[no-untyped-def]
    """Repeat a row's zero points for each column of a tile.

    Args:
        zeros: of each block, int.
        row: of `zeros`.
        groups, width, start: as for `fill_ratios`.
        out: gets one zero point per column of the tile.
    """
    j = 0
    while j < out.size:
        g = groups[j]
        stop = min(out.size, (g + 1) * width - start) if width else j + 1
        out[j:stop] = zeros[row, g]
        j = stop


@kernel
def add_magnitudes(quotients, sums):  # type: ignore[no-untyped-def]
    """Add |q| of a tile to LANES sums: in one order, so that every machine has the same ones."""
    whole = quotients.size // LANES * LANES
    for start in range(0, whole, LANES):
        for lane in range(LANES):
            sums[lane] += abs(np.float64(quotients[start + lane]))
    for j in range(whole, quotients.size):
        sums[j - whole] += abs(np.float64(quotients[j]))


@kernel
def magnitude_of_all(sums, rows, every):  # type: ignore[no-untyped-def]
    """Add up LANES sums over every so many rows, and let them stand for all rows.

    In a loop: code that calls numba's own sum of an array cannot be loaded without scipy's linear
    algebra, which takes a tenth of a second of a merge.
    """
    total = 0.0
    for lane in range(LANES):
        total += sums[lane]
    return total * (rows / ((rows + every - 1) // every))


@kernel
def integer_tile(numbers, codes, limits, room, out):  # type: ignore[no-untyped-def]
    """Round a tile of one row to equally spaced numbers, as far as the quotients are certain.

    Args:
        numbers: dQ, (n,), integers of any type that holds them.
        codes: int8 (n,).
        limits: of `integer_limits`; its type is that of the quotients.
        room: four arrays (n,) of that type: ratios and zero points; the values of the old codes
            and the quotients are put into it.
        out: int8 (n,).

    Returns:
        how many codes changed, and how many are in doubt.
    """
    ratios, points, values, quotients = room
    low, high, certain, magic = limits[0], limits[1], limits[2], limits[3]
    moved, doubts = np.int32(0), np.int32(0)
    for j in range(codes.size):
        values[j] = codes[j]  # into the type of the quotients
        quotients[j] = numbers[j]
        quotient = quotients[j] * ratios[j]
        quotients[j] = quotient
        exact = (values[j] - points[j]) + quotient
        near = (exact + magic) - magic
        doubts = np.int32(doubts + np.int32(abs(exact - near) > certain))
        new = min(max(near + points[j], low), high)
        moved = np.int32(moved + np.int32(new != values[j]))
        out[j] = np.int8(np.int32(new))
    return moved, doubts


@kernel
def decide_integers(  # type: ignore[no-untyped-def]
    numbers, factor, codes, steps, row, groups, base, limits, room, moved, out
):
    """Round again, in exact integers, what `integer_tile` left in doubt.

    Args:
        numbers, codes, limits, room, moved, out: as `integer_tile` took, left and returned them.
        factor: C, float64.
        steps, row, groups: as of `fill_ratios`.
        base: e + 1.

    Returns:
        how many codes of the tile changed.
    """
    _, points, values, quotients = room
    low, high, certain, magic = limits[0], limits[1], limits[2], limits[3]
    for start in range(0, codes.size, LANES):
        stop = min(start + LANES, codes.size)
        doubts = np.int32(0)
        for j in range(start, stop):  # by a vector unit: few runs hold a doubt
            exact = (values[j] - points[j]) + quotients[j]
            near = (exact + magic) - magic
            doubts |= np.int32(abs(exact - near) > certain)
        for j in range(start, stop if doubts else start):
            exact = (values[j] - points[j]) + quotients[j]
            near = (exact + magic) - magic
            step = steps[row, groups[j]]
            if abs(exact - near) > certain and step != 0.0:
                number = np.int64(np.float64(numbers[j]) * factor)
                code, zero = np.int64(codes[j]), np.int64(points[j])
                moved -= np.int32(out[j] != codes[j])
                out[j] = nearest_integer(
                    number, step, base, code, zero, np.int64(low), np.int64(high)
                )
                moved += np.int32(out[j] != codes[j])
    return moved


@kernel
def float_tile(numbers, codes, table, highest, mantissa, sign, room, out):  # type: ignore[no-untyped-def]
    """Round a tile of one row to the numbers of a small float type, where quotients are certain.

    A result is rounded to the spacing of its binade, 2^k / 2^mantissa and at least one unit. At a
    power of two, where the spacing changes, no midpoint is near.

    Args:
        numbers: dQ, (n,), integers of any type that holds them.
        codes: uint8 (n,).
        table: float32 (codes,), what each code stands for, in units.
        highest: the greatest of its numbers, float32.
        mantissa: bits of the type's mantissa, uint32.
        sign: the bit of a code that is its sign, uint32.
        room: four arrays float32 (n,): ratios, then free; the values of the old codes and the
            quotients are put into it, and into the second one where the weight is in doubt.
        out: uint8 (n,).

    Returns:
        how many codes stand for another number than before, and how many are in doubt.
    """
    ratios, unsure, values, quotients = room
    shift = np.uint32(np.uint32(23) - mantissa)
    first = np.uint32(np.uint32(np.uint32(126) + mantissa) << mantissa)
    normal = np.float32(np.uint32(1) << mantissa)
    finer = np.float32(_ONE / normal)
    for j in range(codes.size):
        values[j] = table[codes[j]]
    moved, doubts = np.int32(0), np.int32(0)
    for j in range(codes.size):
        quotients[j] = numbers[j]
        quotient = np.float32(quotients[j] * ratios[j])
        quotients[j] = quotient
        exact = np.float32(values[j] + quotient)
        size = np.float32(min(np.float32(abs(exact)), highest))
        binade = np.uint32(np.float32(size).view(np.uint32) & _EXPONENT).view(np.float32)
        spacing = np.float32(max(np.float32(binade * finer), _ONE))
        magic = np.float32(_MAGIC * spacing)
        near = np.float32(np.float32(size + magic) - magic)
        error = np.float32(_ERROR * np.float32(size + np.float32(abs(values[j]))))
        distance = np.float32(abs(np.float32(size - near)))
        unsure[j] = np.float32(np.float32(distance + error) >= np.float32(_HALF * spacing))
        doubts = np.int32(doubts + np.int32(unsure[j] != _ZERO))
        bits = np.uint32(np.uint32(np.float32(near).view(np.uint32) >> shift) - first)
        new = bits if near >= normal else np.uint32(np.int32(near))
        negative = exact < _ZERO and near > _ZERO
        new = np.uint32(new | sign) if negative else new
        moved = np.int32(moved + np.int32((-near if negative else near) != values[j]))
        out[j] = np.uint8(new)
    return moved, doubts


@kernel
def decide_floats(  # type: ignore[no-untyped-def]
    numbers, factor, codes, steps, row, groups, base, table, middles, sign, room, out
):
    """Round again, in integers, what `float_tile` left in doubt; keep codes of a step of zero.

    Args:
        numbers, codes, table, sign, room, out: as `float_tile` took and left them.
        factor: C, float64.
        steps, row, groups: as of `fill_ratios`.
        base: e + 1 - unit.
        middles: as of `nearest_float`.

    Returns:
        how many codes of the tile stand for another number than before.
    """
    moved = np.int32(0)
    for j in range(codes.size):
        step = steps[row, groups[j]]
        if step == 0.0:
            out[j] = codes[j]
        elif room[1][j] != _ZERO:
            number = np.int64(np.float64(numbers[j]) * factor)
            value = np.int64(table[codes[j]])
            out[j] = nearest_float(number, step, base, value, middles, np.int64(sign))
        moved += np.int32(table[out[j]] != table[codes[j]])
    return moved
