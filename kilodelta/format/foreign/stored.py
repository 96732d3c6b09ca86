"""How a compatibility form's groups lie in the file: row-major, little-endian, each in its type."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kilodelta.errors import InputError
from kilodelta.files.narrow import TYPES, decode, encode

Values = npt.NDArray[Any]

_FLOATS = frozenset(TYPES.values())
_WHOLE = {"I64": "<i8", "U8": "u1"}


def pack(values: Values, dtype: str) -> npt.NDArray[np.uint8]:
    """Values to their bytes, floats rounded to nearest even.

    Raises:
        InputError: a float is not finite, or leaves the type's range.
    """
    if dtype not in _FLOATS:
        return np.ascontiguousarray(values, _WHOLE[dtype]).reshape(-1).view(np.uint8)
    with np.errstate(over="ignore"):
        found = encode(np.asarray(values).reshape(-1), dtype).view(np.uint8)
    if not np.isfinite(decode(found, dtype)).all():
        raise InputError(
            f"a coefficient does not fit {dtype}", fix="keep the coefficients in float32"
        )
    return found


def unpack(data: Values, dtype: str) -> Values:
    """The inverse of `pack`: float32, int64 or uint8 (count,)."""
    if dtype in _FLOATS:
        return decode(data, dtype)
    return np.frombuffer(data.tobytes(), _WHOLE[dtype])
