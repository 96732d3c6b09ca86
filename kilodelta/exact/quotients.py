"""Round rows of updated weights to their grids by short float quotients with a proven error bound.

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

import numpy as np

from kilodelta.exact.compiled import kernel
from kilodelta.exact.nearest import nearest_float, nearest_integer

LIMIT = 1048576.0
"""2^20, what ratios are cut to; every |v| is smaller."""
NARROW = 64
"""The largest |v| up to which float32 is used: it leaves one weight in 8000 in doubt there."""
ROOM = 4
"""Rows of a kernel's own memory: ratios, what is subtracted, values of codes, quotients."""

_UNIT = 2.0**-24
_ERROR = np.float32(8 * _UNIT)
_MAGIC = np.float32(1.5 * 2.0**23)
"""Added to a float32 below 2^22 and taken off again, it rounds to the nearest integer, ties to
even: a vector unit does that at once."""
_EXPONENT = np.uint32(0x7F800000)
_HALF, _ONE, _ZERO = np.float32(0.5), np.float32(1), np.float32(0)


def integer_limits(low: int, high: int, most: int) -> np.ndarray:
    """Return what `integer_row` needs to know of a grid of integers, float32 or float64 (4,).

    Args:
        low, high: what codes are clamped to.
        most: the largest |code - zero point|, below 2^17.

    Returns:
        low, high, the distance to the nearest integer up to which a quotient is certain, and what
        rounds a number of this type to an integer when it is added. The type is that of the
        quotients.
    """
    dtype, unit, magic = np.float32, _UNIT, float(_MAGIC)
    if most > NARROW:
        dtype, unit, magic = np.float64, 2.0**-53, 1.5 * 2.0**52
    certain = 0.5 - unit * 8 * (2 * most + 1)
    # rounded towards zero, which is the safe side
    return np.array([low, high, np.nextafter(dtype(certain), dtype(0)), magic], dtype)


@kernel
def fill_ratios(steps, row, scale, groups, width, out):  # type: ignore[no-untyped-def]
    """Compute r for each column of a row; 0 where the step is 0.

    Args:
        steps: float64 (rows, groups).
        row: which of them.
        scale: C 2^(e - unit), float64.
        groups: the group of each column, int64 (in,).
        width: columns of a group, where each group is that many neighbours; 0 for any order.
        out: (in,), of the type of the quotients.

    Returns:
        how many of the row's steps are 0.
    """
    still = 0
    for g in range(steps.shape[1]):
        step = steps[row, g]
        ratio = scale / step if step != 0.0 else 0.0
        still += step == 0.0
        ratio = min(max(ratio, -LIMIT), LIMIT)
        if width:
            out[g * width : min(g * width + width, out.size)] = ratio
    if not width:
        for j in range(out.size):
            step = steps[row, groups[j]]
            ratio = scale / step if step != 0.0 else 0.0
            out[j] = min(max(ratio, -LIMIT), LIMIT)
    return still


@kernel
def fill_zeros(zeros, row, groups, width, out):  # type: ignore[no-untyped-def]
    """Repeat a row's zero points for each of its columns; the arguments are as `fill_ratios`'."""
    if width:
        for g in range(zeros.shape[1]):
            out[g * width : min(g * width + width, out.size)] = zeros[row, g]
    else:
        for j in range(out.size):
            out[j] = zeros[row, groups[j]]


@kernel
def magnitude(quotients):  # type: ignore[no-untyped-def]
    """Sum |q| of a row in eight runs: one order, so that every machine has one sum."""
    a, b, c, d, e, f, g, h = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    whole = quotients.size // 8 * 8
    for j in range(0, whole, 8):
        a += abs(np.float64(quotients[j]))
        b += abs(np.float64(quotients[j + 1]))
        c += abs(np.float64(quotients[j + 2]))
        d += abs(np.float64(quotients[j + 3]))
        e += abs(np.float64(quotients[j + 4]))
        f += abs(np.float64(quotients[j + 5]))
        g += abs(np.float64(quotients[j + 6]))
        h += abs(np.float64(quotients[j + 7]))
    for j in range(whole, quotients.size):
        a += abs(np.float64(quotients[j]))
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


@kernel
def integer_row(numbers, codes, limits, room, out):  # type: ignore[no-untyped-def]
    """Round one row to equally spaced numbers, as far as the quotients are certain.

    Args:
        numbers: dQ, (in,), integers of any type that holds them.
        codes: int8 (in,).
        limits: of `integer_limits`; its type is that of the quotients.
        room: (ROOM, in) of that type: ratios and zero points; the values of the old codes and the
            quotients are put into it.
        out: int8 (in,).

    Returns:
        how many codes changed, and how many are in doubt.
    """
    ratios, points, values, quotients = room[0], room[1], room[2], room[3]
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
def decide_integers(numbers, factor, codes, steps, row, groups, base, limits, room, out):  # type: ignore[no-untyped-def]
    """Round again, in exact integers, what `integer_row` left in doubt.

    Args:
        numbers, codes, limits, room, out: as `integer_row` took and left them.
        factor: C, float64.
        steps, row, groups: as of `fill_ratios`.
        base: e + 1.

    Returns:
        how many codes of the row changed.
    """
    _, points, values, quotients = room[0], room[1], room[2], room[3]
    low, high, certain, magic = limits[0], limits[1], limits[2], limits[3]
    moved = np.int32(0)
    for j in range(codes.size):
        exact = (values[j] - points[j]) + quotients[j]
        near = (exact + magic) - magic
        step = steps[row, groups[j]]
        if abs(exact - near) > certain and step != 0.0:
            number = np.int64(np.float64(numbers[j]) * factor)
            code, zero = np.int64(codes[j]), np.int64(points[j])
            out[j] = nearest_integer(number, step, base, code, zero, np.int64(low), np.int64(high))
        moved += np.int32(out[j] != codes[j])
    return moved


@kernel
def float_row(numbers, codes, table, highest, mantissa, sign, room, out):  # type: ignore[no-untyped-def]
    """Round one row to the numbers of a small float type, as far as the quotients are certain.

    A result is rounded to the spacing of its binade, 2^k / 2^mantissa and at least one unit. At a
    power of two, where the spacing changes, no midpoint is near.

    Args:
        numbers: dQ, (in,), integers of any type that holds them.
        codes: uint8 (in,).
        table: float32 (codes,), what each code stands for, in units.
        highest: the greatest of its numbers, float32.
        mantissa: bits of the type's mantissa, uint32.
        sign: the bit of a code that is its sign, uint32.
        room: float32 (ROOM, in): ratios, then free; the values of the old codes and the quotients
            are put into it, and into its second row one where the weight is in doubt.
        out: uint8 (in,).

    Returns:
        how many codes stand for another number than before, and how many are in doubt.
    """
    ratios, unsure, values, quotients = room[0], room[1], room[2], room[3]
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
def decide_floats(
    numbers, factor, codes, steps, row, groups, base, table, middles, sign, room, out
):  # type: ignore[no-untyped-def]
    """Round again, in exact integers, what `float_row` left in doubt; keep codes of a step of zero.

    Args:
        numbers, codes, table, sign, room, out: as `float_row` took and left them.
        factor: C, float64.
        steps, row, groups: as of `fill_ratios`.
        base: e + 1 - unit.
        middles: as of `nearest_float`.

    Returns:
        how many codes of the row stand for another number than before.
    """
    moved = np.int32(0)
    for j in range(codes.size):
        step = steps[row, groups[j]]
        if step == 0.0:
            out[j] = codes[j]
        elif room[1, j] != _ZERO:
            number = np.int64(np.float64(numbers[j]) * factor)
            value = np.int64(table[codes[j]])
            out[j] = nearest_float(number, step, base, value, middles, np.int64(sign))
        moved += np.int32(table[out[j]] != table[codes[j]])
    return moved
