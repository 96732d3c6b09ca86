"""Round to a grid in plain Python fractions: slow, to read and to check the kernels with.

It shares no arithmetic with `kilodelta.exact.nearest` (docs/format.md, section 10).
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

from kilodelta.grid.codes import NOT_A_NUMBER, Kind


def new_code(kind: Kind, code: int, zero: int, step: float, update: Fraction) -> int:
    """Return the code of the number of the grid that is nearest to an updated weight.

    Args:
        kind: what codes are.
        code: of the base.
        zero: the zero point.
        step: of any sign; 0 leaves the code as it is.
        update: what is added to the weight's value.

    Example:
        >>> from kilodelta.grid.codes import E2M1, integer_kind
        >>> new_code(integer_kind(4), 2, 0, 0.5, Fraction(1, 4))  # 2.5 is a tie: to the even one
        2
        >>> new_code(E2M1, 7, 0, 1.0, Fraction(100))  # clamped to 6
        7
    """
    if step == 0:
        return code
    wanted = update / Fraction(step)
    if not kind.is_float:
        nearest = round(code - zero + wanted)  # Python rounds halves to even
        return min(max(nearest + zero, kind.low), kind.high)
    values = _values(kind)
    wanted += values[code]
    half = 1 << (kind.bits - 1)
    positive = [k for k in range(half) if k in values]
    # Nearest by distance, then the even code; beyond the last number the last one is nearest.
    best = min(positive, key=lambda k: (abs(values[k] - abs(wanted)), k % 2))
    return best | half if best and wanted < 0 else best


@lru_cache(maxsize=4)
def _values(kind: Kind) -> dict[int, Fraction]:
    import numpy as np

    codes = np.arange(1 << kind.bits, dtype=np.uint8)
    unit = Fraction(2) ** kind.unit
    integers = kind.integers(codes).tolist()
    return {c: n * unit for c, n in zip(codes.tolist(), integers, strict=True) if n != NOT_A_NUMBER}
