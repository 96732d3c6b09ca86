"""Weights from one float type to another, to nearest even, as an export rounds them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kilodelta.files import bfloat16
from kilodelta.files.dtypes import TARGETS

Bytes = npt.NDArray[np.uint8]


def castable(source: str, target: str) -> bool:
    """Whether `cast` knows the way."""
    return source == target or {source, target} <= TARGETS


def lossless(source: str, target: str) -> bool:
    """Whether every value of one safetensors dtype is one of the other too."""
    return source == target or (target == "F32" and source in TARGETS)


def cast(data: Bytes, source: str, target: str) -> Bytes:
    """A tensor's raw bytes in another of the types F32, F16, BF16; too large becomes infinite."""
    if source == target:
        return data
    return _narrow(_widen(data, source), target).view(np.uint8)


def overflows(before: Bytes, source: str, after: Bytes, target: str) -> bool:
    """Whether `cast` has made a finite value infinite."""
    if lossless(source, target):
        return False
    infinite = [np.isinf(_widen(before, source)), np.isinf(_widen(after, target))]
    return bool(infinite[0].sum() != infinite[1].sum())


def _widen(data: Bytes, dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "BF16":
        return bfloat16.unpack(data.view(np.uint16))
    return data.view(np.float16 if dtype == "F16" else np.float32).astype(np.float32)


def _narrow(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.generic]:
    if dtype == "F32":
        return values
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    return bfloat16.pack(values)


def turned(data: Bytes, shape: tuple[int, ...]) -> Bytes:
    """A matrix's raw bytes transposed; those of anything else as they are."""
    if len(shape) != 2 or not data.size:
        return data
    elements = data.view(f"u{data.size // (shape[0] * shape[1])}").reshape(shape)
    return np.ascontiguousarray(elements.T).reshape(-1).view(np.uint8)
