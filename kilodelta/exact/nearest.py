"""Decide in exact integers which number of a grid is nearest to an updated weight.

The new code is that of the number nearest to v + delta / step (docs/format.md, section 10), with
delta = 2^e N and step = M 2^E exact. All is counted in half units of the grid, in which every
midpoint between neighbours is an integer:

    x = 2 V + N 2^s / M,    s = e + 1 - unit - E

and x only matters through its floor and whether it is that integer exactly. A float64 quotient
decides where its error bound leaves no doubt; else int64 does. `exact.quotients` asks here for the
few weights that its own, shorter quotients leave in doubt.
"""

from __future__ import annotations

import math

import numpy as np

from kilodelta.exact.compiled import kernel

FAR = 1 << 30
"""Half units at which a quotient counts as far away: any grid is clamped long before."""

_LONG = np.int64((1 << 21) - 1)
"""The last bits of a float64: one that is set makes more than 32 significant bits."""

_MARGIN = 2.0**-20
"""More than the float64 quotient's error below 2^30: two roundings, 2^-22."""


@kernel
def are_short(steps):  # type: ignore[no-untyped-def]
    """Return whether all steps are M 2^E, |M| < 2^32: every product below then fits int64.

    Args:
        steps: the bits of finite float64, int64 (rows, groups), none of them subnormal.
    """
    bits = np.int64(0)
    for i in range(steps.shape[0]):
        for g in range(steps.shape[1]):
            bits |= steps[i, g]
    return (bits & _LONG) == 0


@kernel
def split(step, base):  # type: ignore[no-untyped-def]
    """Split a step into sign * M * 2^E with M odd.

    Args:
        step: float64, finite.
        base: what E is taken from: s = base - E.

    Returns:
        the sign (0 of a step of zero), M and s, int64, and 2^s / M, float64.
    """
    fraction, exponent = math.frexp(abs(step))
    mantissa, power = np.int64(fraction * 9007199254740992.0), exponent - 53  # 2^53
    if mantissa:
        low = mantissa & -mantissa  # the lowest bit that is set
        mantissa //= low
        power += math.frexp(np.float64(low))[1] - 1
    else:
        mantissa = np.int64(1)
    sign = np.int64(step > 0) - np.int64(step < 0)
    shift = base - power
    return sign, mantissa, np.int64(shift), math.ldexp(1.0 / np.float64(mantissa), shift)


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
def floor_by(number, step, base):  # type: ignore[no-untyped-def]
    """Compute `floor_of` N 2^base / step, for a step that is not zero.

    Args:
        number: N, int64, |N| < 2^53.
        step: float64, of at most 32 significant bits.
        base: e + 1 - unit.
    """
    sign, mantissa, shift, inverse = split(step, base)
    return floor_of(number * sign, shift, mantissa, inverse)


@kernel
def nearest_integer(number, step, base, code, zero, low, high):  # type: ignore[no-untyped-def]
    """Return the new code of one weight on a grid of equally spaced numbers.

    A tie goes to the even multiple of the step.

    Args:
        number: N, int64, |N| < 2^53.
        step: float64, not zero.
        base: e + 1.
        code, zero: the old code and the zero point, int64.
        low, high: what codes are clamped to, int64.
    """
    found = floor_by(number, step, base)
    x = np.int64(2) * (code - zero) + (found >> 1)
    nearest = x >> 1
    if x & 1:  # at a midpoint, or above it
        nearest += np.int64(1) if found & 1 else nearest & 1
    return min(max(nearest + zero, low), high)


@kernel
def nearest_float(number, step, base, value, middles, sign):  # type: ignore[no-untyped-def]
    """Return the new code of one weight on the grid of a small float type.

    A tie goes to the even code, and a result of zero is +0.

    Args:
        number: N, int64, |N| < 2^53.
        step: float64, not zero.
        base: e + 1 - unit.
        value: what the old code stands for, int64, in units.
        middles: int64, the midpoints between positive neighbours, in half units, ascending.
        sign: the bit of a code that is its sign, int64.
    """
    found = floor_by(number, step, base)
    x, beyond = np.int64(2) * value + (found >> 1), found & 1
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
    return np.int64(low) | sign if negative and low else np.int64(low)
