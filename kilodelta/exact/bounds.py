"""Bound exact updates, and say what they are multiples of (docs/format.md, section 6)."""

from __future__ import annotations

from math import ldexp

EXACT = 1 << 53
"""Every partial sum and every element of N stays below this in magnitude, as float64 holds it."""


def exactness(bound: int, e: int) -> str:
    """Say what is wrong with an update 2^e N, |N| and all its partial sums <= bound.

    Args:
        bound: of the sums of magnitudes, scales included.
        e: the exponent of the update's unit.

    Returns:
        The fault, for a sentence, or an empty text; always empty for an update of zero.

    Example:
        >>> exactness(1 << 53, 0)
        'its sums can reach 9.0072e+15, 2^53 is the limit'
    """
    if bound == 0:
        return ""
    if bound >= EXACT:
        return f"its sums can reach {bound:g}, 2^53 is the limit"
    if e < -126:
        return f"its unit is 2^{e}, 2^-126 is the smallest normal float32"
    if e > 127 or ldexp(bound, e) >= 2.0**127:
        return f"it can reach {bound:g} * 2^{e}, float32 ends at 2^128"
    return ""


def unit(bound: int, e: int) -> float:
    """Return 2^e, of which an update 2^e N is a multiple; 1 for an update of zero.

    The format lets a zero update have any exponent. Kernels multiply by this float32 number, and
    zero times 2^128, which is infinite there, would not be zero.

    Example:
        >>> unit(0, 254), unit(1, -3)
        (1.0, 0.125)
    """
    return 1.0 if bound == 0 else ldexp(1.0, e)
