"""Pack and unpack a compatibility form's groups: row-major, little-endian, each in its type."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kilodelta.errors import InputError
from kilodelta.files.dtypes import FLOATS, PRECISIONS, TARGETS

Values = npt.NDArray[Any]

DTYPES = tuple(sorted(PRECISIONS))
"""The types that PEFT's bases are drawn or stored in, by torch's names."""

_WHOLE = {"I64": "<i8", "U8": "u1"}


def pack(values: Values, dtype: str) -> npt.NDArray[np.uint8]:
    """Pack values into bytes, floats rounded to nearest even.

    Raises:
        InputError: a float is not finite, or leaves the type's range.
    """
    if dtype not in TARGETS:
        return np.ascontiguousarray(values, _WHOLE[dtype]).reshape(-1).view(np.uint8)
    packed = FLOATS[dtype].narrow(np.asarray(values).reshape(-1)).view(np.uint8)
    if not np.isfinite(FLOATS[dtype].widen(packed)).all():
        raise InputError(
            f"a coefficient does not fit {dtype}", fix="keep the coefficients in float32"
        )
    return packed


def unpack(data: Values, dtype: str) -> Values:
    """Unpack what `pack` packed: float32, int64 or uint8 (count,)."""
    if dtype in TARGETS:
        return FLOATS[dtype].widen(data)
    return np.frombuffer(data.tobytes(), _WHOLE[dtype])
