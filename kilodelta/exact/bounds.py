"""How large an exact update may be (docs/format.md, section 6)."""

from __future__ import annotations

from math import ldexp

EXACT = 1 << 53
"""Every partial sum and every element of N stays below this in magnitude."""


def exactness(bound: int, e: int) -> str:
    """What is wrong with an update 2^e N, |N| and all its partial sums <= bound; empty if nothing.

    An update of zero is exact whatever its scale.
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
