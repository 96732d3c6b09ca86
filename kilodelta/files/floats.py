"""Convert tensors' raw bytes between float types as an export rounds them: to nearest even."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kilodelta.files.dtypes import FLOATS, TARGETS

Bytes = npt.NDArray[np.uint8]


def castable(source: str, target: str) -> bool:
    """Return whether `cast` converts between two safetensors dtypes."""
    return source == target or {source, target} <= TARGETS


def lossless(source: str, target: str) -> bool:
    """Return whether every value of one safetensors dtype is also one of the other."""
    return source == target or (target == "F32" and source in TARGETS)


def cast(data: Bytes, source: str, target: str) -> Bytes:
    """Convert a tensor's raw bytes, uint8 `(n,)`, between F32, F16 and BF16.

    Values beyond the target's range become infinite.

    Example:
        >>> cast(np.float32([1.5]).view(np.uint8), "F32", "F16").view(np.float16)
        array([1.5], dtype=float16)
    """
    if source == target:
        return data
    # float32 is what `narrow` takes, and `widen` would copy it
    values = data.view(np.float32) if source == "F32" else FLOATS[source].widen(data)
    return FLOATS[target].narrow(values).view(np.uint8)


def overflows(before: Bytes, source: str, after: Bytes, target: str) -> bool:
    """Return whether `cast` has made a finite value infinite.

    Args:
        before: the raw bytes that were cast, of safetensors dtype `source`.
        source: their dtype.
        after: what `cast` returned.
        target: the dtype of `after`.
    """
    if lossless(source, target):
        return False
    # An infinity stays one, so only a result that holds some is compared with its source.
    infinite = FLOATS[target].infinities(after)
    return infinite > 0 and infinite != FLOATS[source].infinities(before)


def transposed(data: Bytes, shape: tuple[int, ...]) -> Bytes:
    """Return a matrix's raw bytes transposed; those of a tensor of another rank unchanged.

    Example:
        >>> transposed(np.array([1, 2, 3, 4, 5, 6], np.uint8), (2, 3))
        array([1, 4, 2, 5, 3, 6], dtype=uint8)
    """
    if len(shape) != 2 or not data.size:
        return data
    elements = data.view(f"u{data.size // (shape[0] * shape[1])}").reshape(shape)
    return np.ascontiguousarray(elements.T).reshape(-1).view(np.uint8)
