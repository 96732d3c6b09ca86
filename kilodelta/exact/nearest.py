"""Round an updated weight to the nearest number of its grid, decided in exact integers.

The new code is that of the number nearest to v + delta / step (docs/format.md, section 10), with
delta = 2^e N and step = M 2^E exact. All is counted in half units of the grid, in which every
midpoint between neighbours is an integer:

    x = 2 V + N 2^s / M,    s = e + 1 - unit - E

and x only matters through its floor and whether it is that integer exactly. A float64 quotient
decides where its error bound leaves no doubt; else int64 does.
"""

from __future__ import annotations

import numpy as np

from kilodelta.exact.compiled import kernel

MANTISSA = 1 << 32
"""Steps have odd mantissas M below this: every product here then fits int64."""

FAR = 1 << 30
"""Half units at which a quotient counts as far away: any grid is clamped long before."""

_TO_INTEGER = 1.5 * 2.0**52
"""Added to a float64 below 2^51 and taken off again, it rounds to the nearest integer, ties to
even: a vector unit does that at once."""
_SURE = 0.5 - 2.0**-20
"""Distance from the nearest integer up to which a float64 sum rounds as the exact one does."""

_MARGIN = 2.0**-20
"""More than the float64 quotient's error below 2^30: two roundings, 2^-22."""


@kernel
def floor_of(number, shift, mantissa, inverse):  # type: ignore[no-untyped-def]
    """Compute the floor of N 2^s / M, twice, plus one if the quotient is no integer.

    Args:
        number: N, int64, |N| < 2^53.
        shift: s.
        mantissa: M, int64, odd, 0 < M < 2^32.
        inverse: float64 of 2^s / M.
    """
    if number == 0:  # a shift of zero by more than 63 is undefined
        return np.int64(0)
    quotient = np.float64(number) * inverse
    if quotient >= 1073741824.0:
        return np.int64(2 * 1073741824 + 1)
    if quotient <= -1073741824.0:
        return np.int64(-2 * 1073741824 + 1)
    low = np.floor(quotient)
    rest = quotient - low
    if rest > _MARGIN and rest < 1.0 - _MARGIN:
        return np.int64(2) * np.int64(low) + np.int64(1)
    near = np.int64(np.floor(quotient + 0.5))
    if shift >= 0:
        # |N 2^s| < 2^30 M < 2^62
        difference = (number << np.int64(shift)) - near * mantissa
    elif near == 0:
        difference = number
    else:
        # near M 2^-s is close to N, so below 2^54
        difference = number - ((near * mantissa) << np.int64(-shift))
    if difference == 0:
        return np.int64(2) * near
    return np.int64(2) * (near if difference > 0 else near - np.int64(1)) + np.int64(1)


@kernel
def _magnitude(numbers, ratios):  # type: ignore[no-untyped-def]
    """Sum |N ratio| of a row in four runs: one order, so that every machine has one sum."""
    first, second, third, fourth = 0.0, 0.0, 0.0, 0.0
    whole = numbers.size // 4 * 4
    for j in range(0, whole, 4):
        first += abs(np.float64(numbers[j]) * ratios[j])
        second += abs(np.float64(numbers[j + 1]) * ratios[j + 1])
        third += abs(np.float64(numbers[j + 2]) * ratios[j + 2])
        fourth += abs(np.float64(numbers[j + 3]) * ratios[j + 3])
    for j in range(whole, numbers.size):
        first += abs(np.float64(numbers[j]) * ratios[j])
    return (first + second) + (third + fourth)


@kernel
def _spread(values, groups, width, out):  # type: ignore[no-untyped-def]
    """Repeat one value per group for each column of a row; `width` as of `round_integers`."""
    if width:
        for g in range(values.size):
            out[g * width : min(g * width + width, out.size)] = values[g]
    else:
        for j in range(out.size):
            out[j] = values[groups[j]]


@kernel
def round_row(numbers, codes, points, ratios, low, high, out):  # type: ignore[no-untyped-def]
    """Round one row by float64 quotients, and count what they leave in doubt.

    Args:
        numbers: dQ, (in,).
        codes: int8 (in,).
        points: float64 (in,), the zero point of each column.
        ratios: float64 (in,), C 2^e / step of each column; 0 where the step is.
        low, high: what codes are clamped to.
        out: int8 (in,).

    Returns:
        how many codes changed, and how many are in doubt.
    """
    doubts, moved = np.int32(0), np.int32(0)
    for j in range(codes.size):
        # A quotient below 2^20 is off by less than 2^-31; a larger one is clamped in any case.
        exact = np.float64(codes[j]) - points[j] + np.float64(numbers[j]) * ratios[j]
        near = (exact + _TO_INTEGER) - _TO_INTEGER
        doubts += np.int32(abs(exact - near) > _SURE)
        new = np.int32(min(max(near + points[j], low), high))
        moved += np.int32(new != np.int32(codes[j]))
        out[j] = np.int8(new)
    return moved, doubts


@kernel
def round_exactly(numbers, factor, codes, points, ratios, steps, row, low, high, out):  # type: ignore[no-untyped-def]
    """Round again what `round_row` left in doubt, in integers; return how many codes changed.

    Args:
        numbers: dQ, (in,).
        factor: C 2^e.
        codes: int8 (in,).
        points, ratios: as `round_row` takes them.
        steps: signs, mantissas, shifts and inverses of the steps, each (out, groups), and the
            group of each column, (in,).
        row: which row of `steps` it is.
        low, high: what codes are clamped to.
        out: int8 (in,), as `round_row` left it.
    """
    signs, mantissas, shifts, inverses, groups = steps
    moved = np.int32(0)
    for j in range(codes.size):
        exact = np.float64(codes[j]) - points[j] + np.float64(numbers[j]) * ratios[j]
        near = (exact + _TO_INTEGER) - _TO_INTEGER
        if abs(exact - near) > _SURE:
            g, zero = groups[j], np.int64(points[j])
            number = np.int64(np.float64(numbers[j]) * factor) * signs[row, g]
            found = floor_of(number, shifts[row, g], mantissas[row, g], inverses[row, g])
            x = np.int64(2) * (np.int64(codes[j]) - zero) + (found >> 1)
            nearest = x >> 1
            if x & 1:  # at a midpoint, or above it
                nearest += np.int64(1) if found & 1 else nearest & 1
            out[j] = min(max(nearest + zero, np.int64(low)), np.int64(high))
        moved += np.int32(out[j] != codes[j])
    return moved


@kernel
def integer_row(numbers, factor, codes, zeros, steps, row, width, low, high, room, out):  # type: ignore[no-untyped-def]
    """Round one row to equally spaced numbers; `round_integers` says how.

    Args:
        numbers: dQ, (in,).
        factor, steps, width, low, high: as of `round_integers`.
        codes: int8 (in,).
        zeros: int64 (groups,).
        row: which one of `steps`.
        room: float64 (2, in), for the ratios and zero points of the columns.
        out: int8 (in,).
    """
    signs, _, _, inverses, groups = steps
    ratios, points = room[0], room[1]
    own = np.empty(zeros.size)
    for g in range(own.size):  # the inverse of a step of zero is none
        sign = np.float64(signs[row, g])
        own[g] = factor * (0.5 * inverses[row, g]) * sign if sign != 0.0 else 0.0
    _spread(own, groups, width, ratios)
    _spread(zeros, groups, width, points)
    moved, doubts = round_row(numbers, codes, points, ratios, low, high, out)
    if doubts:
        moved = round_exactly(numbers, factor, codes, points, ratios, steps, row, low, high, out)
    return moved, _magnitude(numbers, ratios)


@kernel
def round_integers(numbers, factor, codes, zeros, steps, width, low, high, out):  # type: ignore[no-untyped-def]
    """Round to equally spaced numbers, ties to even multiples of the step.

    Args:
        numbers: dQ, (rows, in), integers of any type that holds them.
        factor: C, float64.
        codes: int8 (rows, in).
        zeros: int64 (rows, groups).
        steps: of `step_parts`, with the group of each column, int64 (in,).
        width: columns of a group, where each group is that many neighbours; 0 for any order.
        low, high: what codes are clamped to.
        out: int8 (rows, in).

    Returns:
        how many codes changed, and the sum of |delta / step|, roughly.
    """
    changed, size, room = 0, 0.0, np.empty((2, codes.shape[1]))
    for i in range(codes.shape[0]):
        moved, magnitude = integer_row(
            numbers[i], factor, codes[i], zeros[i], steps, i, width, low, high, room, out[i]
        )
        changed += int(moved)
        size += magnitude
    return changed, size


@kernel
def round_floats(numbers, factor, codes, table, middles, steps, sign, out):  # type: ignore[no-untyped-def]
    """Round to the numbers of a small float type, ties to the even code, without infinity or NaN.

    Args:
        numbers, factor, steps: as of `round_integers`.
        codes: uint8 (rows, in).
        table: int64 (256,) or fewer, what each code stands for, in units.
        middles: int64, the midpoints between positive neighbours, in half units, ascending.
        sign: the bit of a code that is its sign.
        out: uint8 (rows, in).

    Returns:
        as `round_integers`; a change between -0 and +0 counts as none.
    """
    signs, mantissas, shifts, inverses, groups = steps
    changed, size = 0, 0.0
    rows, columns = codes.shape
    for i in range(rows):
        own = 0.0  # summed row by row, as the fused merge does
        for j in range(columns):
            g, code = groups[j], codes[i, j]
            out[i, j] = code
            if signs[i, g] == 0:
                continue
            number = np.int64(np.float64(numbers[i, j]) * factor) * signs[i, g]
            own += abs(np.float64(number) * inverses[i, g])
            found = floor_of(number, shifts[i, g], mantissas[i, g], inverses[i, g])
            x, beyond = np.int64(2) * table[code] + (found >> 1), found & 1
            negative = x < 0
            if negative:
                x = -x - beyond
            low, high = 0, middles.size  # how many midpoints lie below
            while low < high:
                middle = (low + high) >> 1
                if middles[middle] < x or (middles[middle] == x and beyond):
                    low = middle + 1
                else:
                    high = middle
            if low < middles.size and middles[low] == x and not beyond and low & 1:
                low += 1  # a tie, and the lower neighbour is odd
            new = np.uint8(low)
            if negative and low:
                new = np.uint8(low | sign)
            out[i, j] = new
            changed += table[new] != table[code]
        size += own
    return changed, 0.5 * size


ROUND = (round_integers, round_floats)
"""The kernels for integers and for small floats."""
