"""One row per tensor type: its bits, and what each library of the field calls it.

Rows are keyed by the safetensors name (`F32`), which files, digests and this project's code use.
`FloatType` rows also convert: raw little-endian bytes to float32 values and back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class DType:
    """A tensor type and its names; a name is empty (or 0) where the library lacks the type.

    Attributes:
        name: in safetensors files, such as `F32`.
        bits: of one element.
        long: numpy's, ml_dtypes' and torch's name, such as `float32`.
        storage: the numpy dtype string that holds one element's little-endian bits. It equals the
            type itself except for those that numpy lacks (`<u2` for bfloat16); empty below a byte.
        onnx: the name in `onnx.TensorProto.DataType`, such as `FLOAT`.
        onnx_number: the number there; only of types that weights in ONNX files are looked up in.
        tensorrt: the name in `tensorrt.DataType`, such as `HALF`.
        triton: the name in Triton Inference Server's `config.pbtxt`, such as `TYPE_FP32`.
    """

    name: str
    bits: int
    long: str = ""
    storage: str = ""
    onnx: str = ""
    onnx_number: int = 0
    tensorrt: str = ""
    triton: str = ""


@dataclass(frozen=True, kw_only=True)
class FloatType(DType):
    """A floating-point type whose values this project reads and writes.

    Attributes:
        short: the name in this project's options, such as `bf16`.
        fraction_bits: stored bits of the significand, without the implied one.
    """

    short: str
    fraction_bits: int

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy type to compute in: the type itself, or float32 where numpy lacks it."""
        return np.dtype(np.float32 if self.name == "BF16" else self.long)

    @property
    def unit_roundoff(self) -> float:
        """The largest relative error of rounding to nearest: 2^-(fraction_bits + 1)."""
        return 2.0 ** -(self.fraction_bits + 1)

    def widen(self, data: Array) -> npt.NDArray[np.float32]:
        """Return the values as a new float32 array, exactly (float64 is rounded).

        Args:
            data: raw bytes, uint8 `(n,)`, or elements of the `storage` dtype of any shape.

        Example:
            >>> FLOATS["BF16"].widen(np.array([0x80, 0x3F, 0x20, 0xC0], np.uint8))
            array([ 1. , -2.5], dtype=float32)
        """
        elements = data.view(self.storage)
        if self.name == "BF16":  # the upper half of a float32
            return (elements.astype(np.uint32) << 16).view(np.float32)
        return elements.astype(np.float32)

    def narrow(self, values: Array) -> Array:
        """Round float32 values to this type, to nearest even.

        Values beyond the range become infinite; in bfloat16 every NaN becomes the quiet 0x7FC0.

        Returns:
            contiguous elements of the `storage` dtype, in the shape of `values`.

        Example:
            >>> [hex(word) for word in FLOATS["BF16"].narrow(np.float32([1.0, -2.5]))]
            ['0x3f80', '0xc020']
        """
        floats = np.ascontiguousarray(values, np.float32).reshape(np.shape(values))
        if self.name != "BF16":
            with np.errstate(over="ignore"):
                return floats.astype(self.storage)
        bits = floats.view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype("<u2")
        # adding the bias to a NaN whose payload is all ones would wrap around to zero
        return np.where(np.isnan(floats), np.uint16(0x7FC0), rounded).astype("<u2", copy=False)

    def infinities(self, data: Array) -> int:
        """Count the infinite values in raw bytes, uint8 `(n,)`, by their bits.

        Example:
            >>> FLOATS["F16"].infinities(np.float16([1, np.inf, -np.inf, np.nan]).view(np.uint8))
            2
        """
        bits = data.view(f"<u{self.bits // 8}")
        magnitude = bits & bits.dtype.type((1 << (self.bits - 1)) - 1)
        exponent = (1 << (self.bits - 1)) - (1 << self.fraction_bits)
        return int(np.count_nonzero(magnitude == bits.dtype.type(exponent)))

    def rounded(self, values: Array) -> npt.NDArray[np.float32]:
        """Round float32 values to this type and return them as float32, in the same shape."""
        return self.widen(self.narrow(values))


_ROWS: tuple[DType, ...] = (
    FloatType(
        name="F64", bits=64, long="float64", storage="<f8", onnx="DOUBLE", onnx_number=11,
        triton="TYPE_FP64", short="fp64", fraction_bits=52,
    ),
    FloatType(
        name="F32", bits=32, long="float32", storage="<f4", onnx="FLOAT", onnx_number=1,
        tensorrt="FLOAT", triton="TYPE_FP32", short="fp32", fraction_bits=23,
    ),
    FloatType(
        name="F16", bits=16, long="float16", storage="<f2", onnx="FLOAT16", onnx_number=10,
        tensorrt="HALF", triton="TYPE_FP16", short="fp16", fraction_bits=10,
    ),
    FloatType(
        name="BF16", bits=16, long="bfloat16", storage="<u2", onnx="BFLOAT16", onnx_number=16,
        tensorrt="BF16", triton="TYPE_BF16", short="bf16", fraction_bits=7,
    ),
    DType(
        name="I64", bits=64, long="int64", storage="<i8", onnx="INT64", onnx_number=7,
        tensorrt="INT64", triton="TYPE_INT64",
    ),
    DType(
        name="I32", bits=32, long="int32", storage="<i4", onnx="INT32", onnx_number=6,
        tensorrt="INT32", triton="TYPE_INT32",
    ),
    DType(
        name="I16", bits=16, long="int16", storage="<i2", onnx="INT16", onnx_number=5,
        triton="TYPE_INT16",
    ),
    DType(
        name="I8", bits=8, long="int8", storage="|i1", onnx="INT8", onnx_number=3,
        tensorrt="INT8", triton="TYPE_INT8",
    ),
    DType(
        name="U64", bits=64, long="uint64", storage="<u8", onnx="UINT64", onnx_number=13,
        triton="TYPE_UINT64",
    ),
    DType(
        name="U32", bits=32, long="uint32", storage="<u4", onnx="UINT32", onnx_number=12,
        triton="TYPE_UINT32",
    ),
    DType(
        name="U16", bits=16, long="uint16", storage="<u2", onnx="UINT16", onnx_number=4,
        triton="TYPE_UINT16",
    ),
    DType(
        name="U8", bits=8, long="uint8", storage="|u1", onnx="UINT8", onnx_number=2,
        tensorrt="UINT8", triton="TYPE_UINT8",
    ),
    DType(
        name="BOOL", bits=8, long="bool", storage="|b1", onnx="BOOL", onnx_number=9,
        tensorrt="BOOL", triton="TYPE_BOOL",
    ),
    DType(name="C64", bits=64, long="complex64", storage="<c8", onnx="COMPLEX64", onnx_number=14),
    DType(name="F8_E4M3", bits=8, long="float8_e4m3fn", storage="|u1",
          onnx="FLOAT8E4M3FN", onnx_number=17),
    DType(name="F8_E5M2", bits=8, long="float8_e5m2", storage="|u1", onnx="FLOAT8E5M2"),
    DType(name="F8_E8M0", bits=8, long="float8_e8m0fnu", storage="|u1", onnx="FLOAT8E8M0"),
    DType(name="F8_E4M3FNUZ", bits=8, long="float8_e4m3fnuz", storage="|u1",
          onnx="FLOAT8E4M3FNUZ"),
    DType(name="F8_E5M2FNUZ", bits=8, long="float8_e5m2fnuz", storage="|u1",
          onnx="FLOAT8E5M2FNUZ"),
    DType(name="F4", bits=4),
    DType(name="F6_E2M3", bits=6),
    DType(name="F6_E3M2", bits=6),
)  # fmt: skip


def _by(rows: Iterable[DType], key: str) -> Mapping[Any, DType]:
    return MappingProxyType({getattr(row, key): row for row in rows if getattr(row, key)})


DTYPES: Mapping[str, DType] = _by(_ROWS, "name")
"""Every type of safetensors, by its name there."""

FLOATS: Mapping[str, FloatType] = MappingProxyType(
    {row.name: row for row in _ROWS if isinstance(row, FloatType)}
)
"""The types whose values can be read and written, by safetensors name."""

PRECISIONS: Mapping[str, FloatType] = MappingProxyType(
    {FLOATS[name].long: FLOATS[name] for name in ("F32", "F16", "BF16")}
)
"""The types that models compute in, by numpy's and torch's name, the finest first."""

TARGETS = frozenset(row.name for row in PRECISIONS.values())
"""The types that a delta can change by arithmetic."""

BY_LONG: Mapping[str, DType] = _by(_ROWS, "long")
"""By numpy's, ml_dtypes' and torch's name, such as `bfloat16`."""

BY_ONNX_NUMBER: Mapping[int, DType] = _by(_ROWS, "onnx_number")
"""By the number in `onnx.TensorProto.DataType`."""

BY_TENSORRT: Mapping[str, DType] = _by(_ROWS, "tensorrt")
"""By the name in `tensorrt.DataType`."""


def named(long: str) -> FloatType:
    """Return the float type that numpy and torch call `long`.

    Raises:
        KeyError: `long` is no float type of this table.
    """
    return FLOATS[BY_LONG[long].name]


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes that a tensor takes in a file; a last incomplete byte counts.

    Example:
        >>> nbytes("BF16", (3, 5)), nbytes("F4", (3,))
        (30, 2)
    """
    return (DTYPES[dtype].bits * prod(shape) + 7) // 8
