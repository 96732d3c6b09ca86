"""The tensor types of safetensors, by their names there."""

from __future__ import annotations

from math import prod
from types import MappingProxyType

BITS = MappingProxyType(
    {
        "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
        "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
        "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
        "I32": 32, "U32": 32, "F32": 32,
        "I64": 64, "U64": 64, "F64": 64, "C64": 64,
    }
)  # fmt: skip
"""Bits of one element."""

TARGETS = frozenset({"F32", "F16", "BF16"})
"""The types that a delta can change by arithmetic."""

NUMPY = MappingProxyType(
    {
        "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16",
        "int32": "I32", "uint32": "U32", "int64": "I64", "uint64": "U64",
        "float16": "F16", "float32": "F32", "float64": "F64", "complex64": "C64",
        "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
        "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fnuz": "F8_E4M3FNUZ",
        "float8_e5m2fnuz": "F8_E5M2FNUZ",
    }
)  # fmt: skip
"""numpy, ml_dtypes and torch name to safetensors name."""


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor, the last one rounded up."""
    return (BITS[dtype] * prod(shape) + 7) // 8
