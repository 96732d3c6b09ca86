"""Name the sets of numbers that a code can stand for: small integers, E2M1 and E4M3.

E2M1 and E4M3 are those of the OCP Microscaling Formats (MX) specification 1.0 and OCP 8-bit
Floating Point (OFP8) 1.0: E4M3 has no infinity, and S.1111.111 is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a code is.

    Attributes:
        name: `int4`, `e2m1`, `e4m3`, ...
        bits: of a stored code.
        dtype: numpy's, of codes in memory: int8 for integers, which are signed and centred (a
            stored unsigned nibble u is u - 8), uint8 for the bits of the float kinds.
        unit: the exponent of what `integers` counts: a code stands for integer * 2^unit.
        low, high: the least and the greatest such integer.
    """

    name: str
    bits: int
    dtype: str
    unit: int
    low: int
    high: int
    _table: tuple[int, ...] | None = field(default=None, repr=False)

    @property
    def is_float(self) -> bool:
        """Whether the values are those of a small float type, not equally spaced integers."""
        return self._table is not None

    def integers(self, codes: npt.NDArray[Any]) -> Integers:
        """Return what codes stand for, int32 in the shape of `codes`, in steps of 2^unit.

        NaN, which only E4M3 has, comes out as `NOT_A_NUMBER`.

        Example:
            >>> E2M1.integers(np.array([0, 1, 7, 8, 15], np.uint8)).tolist()
            [0, 1, 12, 0, -12]
        """
        if self._table is None:
            return codes.astype(np.int32)
        table: Integers = np.array(self._table, np.int32)
        return np.asarray(table[codes])

    def plus_zero(self, codes: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the codes with -0, which the float kinds have, written as +0."""
        if self._table is None:
            return codes
        minus_zero = np.uint8(1 << (self.bits - 1))
        return np.where(codes == minus_zero, np.uint8(0), codes)


NOT_A_NUMBER = np.iinfo(np.int32).max
"""What `Kind.integers` gives for a NaN."""


@lru_cache(maxsize=8)
def integer_kind(bits: int) -> Kind:
    """Return the kind of signed integers of 1 to 8 bits, -2^(bits-1) to 2^(bits-1) - 1.

    Example:
        >>> integer_kind(4).low, integer_kind(4).high
        (-8, 7)
    """
    half = 1 << (bits - 1)
    return Kind(name=f"int{bits}", bits=bits, dtype="int8", unit=0, low=-half, high=half - 1)


def _float_table(exponent_bits: int, mantissa_bits: int) -> tuple[int, ...]:
    """List every code's value as a multiple of the smallest positive one, codes ascending."""
    positive = []
    for code in range(1 << (exponent_bits + mantissa_bits)):
        exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        implied = (1 << mantissa_bits) if exponent else 0
        positive.append((implied + mantissa) << max(exponent - 1, 0))
    return (*positive, *(-value for value in positive))


def _e4m3_table() -> tuple[int, ...]:
    table = list(_float_table(4, 3))
    table[0x7F] = table[0xFF] = NOT_A_NUMBER
    return tuple(table)


E2M1 = Kind(
    name="e2m1", bits=4, dtype="uint8", unit=-1, low=-12, high=12, _table=_float_table(2, 1)
)
"""0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; bit 3 is the sign."""

E4M3 = Kind(
    name="e4m3", bits=8, dtype="uint8", unit=-9, low=-229376, high=229376, _table=_e4m3_table()
)
"""Multiples of 2^-9 up to 448; bit 7 is the sign."""


def e4m3_values(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Decode E4M3 bytes, such as the scales of NVFP4, to float64; NaN stays NaN.

    Example:
        >>> e4m3_values(np.array([0x38, 0x7E, 0x01], np.uint8)).tolist()
        [1.0, 448.0, 0.001953125]
    """
    integers = E4M3.integers(data)
    return np.where(integers == NOT_A_NUMBER, np.nan, np.ldexp(integers.astype(np.float64), -9))
