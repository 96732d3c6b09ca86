"""Read weights of ONNX graphs: `MatMulNBits`, and `DequantizeLinear` of constants.

Sources: com.microsoft MatMulNBits (ONNX Runtime 1.32's ContribOperators) and the ONNX operator
DequantizeLinear, opset 21 to 25. Parts are named as the operators' inputs; types of fewer than
eight bits come as U8 of packed bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kilodelta.errors import CheckpointError
from kilodelta.files.tensor import RawTensor
from kilodelta.grid.bits import pack_bits, replace_bits, unpack_bits, unpack_signed
from kilodelta.grid.codes import E2M1, E4M3, Kind, integer_kind
from kilodelta.grid.layouts.base import (
    SCALES,
    Codes,
    Layout,
    Parts,
    centred,
    float_values,
    part,
    signed_nibbles,
    sized,
    uncentred,
)
from kilodelta.grid.matrix import Matrix, Shape

FINEST_ZERO = 2.0**-16
"""Zero points in a float type are multiples of this, so that every value is exact in float64."""


def in_blocks(columns: int, group: int) -> npt.NDArray[np.bool_]:
    """Return which columns of a weight are in which block, bool (columns, blocks).

    As a matrix of ones it makes of x (..., columns) the sum over each block.

    Args:
        columns: of the weight.
        group: of a block; the last one may be cut.

    Example:
        >>> in_blocks(3, group=2).astype(int).tolist()
        [[1, 0], [1, 0], [0, 1]]
    """
    blocks = np.arange(-(-columns // group))
    held: npt.NDArray[np.bool_] = np.arange(columns)[:, None] // group == blocks
    return held


@dataclass(frozen=True, kw_only=True)
class MatMulNBits(Layout):
    """`B` U8 (N, blocks, bytes of a block): unsigned codes, low bits first; N is `out`, K `in`."""

    name: ClassVar[str] = "ONNX MatMulNBits"
    codes_in: ClassVar[str] = "B"

    bits: int
    group: int

    @property
    def _groups(self) -> int:
        return -(-self.shape[1] // self.group)

    def unpack(self, parts: Parts) -> Matrix:
        rows, columns = self.shape
        scales = part(parts, "scales", self.name, ("F32", "F16", "BF16"))
        grid = (rows, self._groups)
        sized(scales, "scales", self.name, (grid, (rows * self._groups,), (*grid, 1)))
        steps = float_values(scales).reshape(grid)
        zeros, minima = self._zeros(parts, steps)
        if "minima" in parts:
            minima = self._minima(parts)
        return Matrix(
            kind=integer_kind(self.bits),
            codes=unpack_signed(self._stream(parts), self.bits, columns),
            steps=steps,
            block=(1, self.group),
            zeros=zeros,
            minima=minima,
        )

    def are_sums(self, tensor: RawTensor) -> bool:
        """Return whether a product by a constant (in, blocks) is the sum over each block."""
        columns = self.shape[1]
        if tensor.shape != (columns, self._groups) or tensor.dtype not in SCALES:
            return False
        return bool(np.array_equal(float_values(tensor), in_blocks(columns, self.group)))

    def _minima(self, parts: Parts) -> npt.NDArray[np.float64]:
        """Read the minima, stored (blocks, out)."""
        minima = part(parts, "minima", self.name, SCALES)
        sized(minima, "minima", self.name, ((self._groups, self.shape[0]),))
        if "zero_points" in parts and parts["zero_points"].dtype != "U8":
            raise CheckpointError(
                f"{self.name}: a weight has minima and zero points in a float type",
                fix="export the graph anew",
            )
        return np.ascontiguousarray(float_values(minima).T)

    def _stream(self, parts: Parts) -> npt.NDArray[np.uint8]:
        rows = self.shape[0]
        codes = part(parts, self.codes_in, self.name, ("U8",))
        nbytes = self.group * self.bits // 8
        sized(codes, self.codes_in, self.name, ((rows, self._groups, nbytes),))
        return codes.data.reshape(rows, -1)

    def _zeros(
        self, parts: Parts, steps: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.int16] | None, npt.NDArray[np.float64] | None]:
        """Read the zero points: integers, or minima where a float one is no integer."""
        if "zero_points" not in parts:
            return None, None
        rows, grid = self.shape[0], (self.shape[0], self._groups)
        points = part(parts, "zero_points", self.name, ("U8", *SCALES))
        if points.dtype == "U8":
            nbytes = -(-self._groups * self.bits // 8)
            sized(points, "zero_points", self.name, ((rows, nbytes), (rows * nbytes,)))
            stored = unpack_bits(points.data.reshape(rows, -1), self.bits)[:, : self._groups]
            return centred(stored, self.bits).astype(np.int16), None
        sized(points, "zero_points", self.name, (grid, (grid[0] * grid[1],)))
        half = 1 << (self.bits - 1)
        floats = float_values(points).reshape(grid) - half
        if np.array_equal(floats, np.rint(floats)) and (np.abs(floats) < 1 << 14).all():
            return floats.astype(np.int16), None
        fine = floats / FINEST_ZERO
        if not (np.array_equal(fine, np.rint(fine)) and (np.abs(floats) < 1 << 8).all()):
            raise CheckpointError(
                f"{self.name}: a zero point is no multiple of 2^-16 below 256, so float64 cannot"
                " hold the weights exactly",
                fix="quantise with integer zero points",
            )
        return None, -steps * floats

    def recode(self, parts: Parts, codes: Codes) -> RawTensor:
        stream = replace_bits(self._stream(parts), self.bits, uncentred(codes, self.bits))
        return RawTensor(dtype="U8", shape=parts[self.codes_in].shape, data=stream.reshape(-1))


_INTEGERS = {"INT4": 4, "UINT4": 4, "INT8": 8, "UINT8": 8, "INT2": 2, "UINT2": 2}


@dataclass(frozen=True, kw_only=True)
class DequantizeLinear(Layout):
    """`x` as a whole constant, (K, N) or (N, K), with a scale per tensor, per slice, or per block.

    `x` below a byte is one flat bit stream over all rows, low bits first, without row padding.
    """

    name: ClassVar[str] = "ONNX DequantizeLinear"
    codes_in: ClassVar[str] = "x"

    type: str
    """ONNX's name of the type of `x`: `INT4`, `UINT4`, `INT8`, `UINT8`, `FLOAT8E4M3FN`, ..."""
    transposed: bool
    """Whether `x` is (in, out), as the second input of a MatMul is."""
    block: Shape
    """Rows and columns of the weight (out, in) that share a scale."""

    @property
    def kind(self) -> Kind:
        """What a code is."""
        if self.type in _INTEGERS:
            return integer_kind(_INTEGERS[self.type])
        return {"FLOAT8E4M3FN": E4M3, "FLOAT4E2M1": E2M1}[self.type]

    @property
    def _is_unsigned(self) -> bool:
        return self.type.startswith("U")

    def unpack(self, parts: Parts) -> Matrix:
        scales = part(parts, "x_scale", self.name, (*SCALES, "F8_E4M3"))
        rows, columns = self.shape
        grid = (-(-rows // self.block[0]), -(-columns // self.block[1]))
        steps = self._upright(float_values(scales), grid)
        if "x_scale_scale" in parts:  # NVFP4: the E4M3 scales are dequantised by one float
            whole = part(parts, "x_scale_scale", self.name, SCALES)
            sized(whole, "x_scale_scale", self.name, ((), (1,)))
            steps = steps * float_values(whole).reshape(())
        zeros = self._zeros(parts, grid)
        codes = self._upright(self._signed(self._stored(parts)), self.shape)
        return Matrix(kind=self.kind, codes=codes, steps=steps, block=self.block, zeros=zeros)

    def _upright(self, values: npt.NDArray[Any], shape: Shape) -> npt.NDArray[Any]:
        """Bring stored values into the shape of the weight or of its blocks, (out, in)."""
        if values.size != shape[0] * shape[1]:
            raise CheckpointError(
                f"{self.name}: a constant has shape {list(values.shape)}, not {list(shape)}",
                fix="export the graph anew",
            )
        if not self.transposed:
            return values.reshape(shape)
        return np.ascontiguousarray(values.reshape(shape[::-1]).T)

    def _stored(self, parts: Parts) -> npt.NDArray[np.uint8]:
        """Return the stored codes in their order in the file, uint8 (out * in,)."""
        x, size = part(parts, self.codes_in, self.name, ("U8", "I8", "F8_E4M3")), self.kind.bits
        count = self.shape[0] * self.shape[1]
        _packed_size(x, self.codes_in, -(-count * size // 8))
        return unpack_bits(x.data.reshape(1, -1), size)[0, :count]

    def _signed(self, stored: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """Turn stored codes into those of the kind."""
        size = self.kind.bits
        if self.kind.is_float:
            return stored
        if self._is_unsigned:
            return centred(stored, size)
        if size == 8:
            return stored.view(np.int8)
        return signed_nibbles(stored) if size == 4 else _sign_extended(stored, size)

    def _zeros(self, parts: Parts, grid: Shape) -> npt.NDArray[np.int16] | None:
        if self.kind.is_float:
            return None  # the operator's zero point of a float type is zero
        half = 1 << (self.kind.bits - 1)
        if "x_zero_point" not in parts:
            return np.full(grid, -half, np.int16) if self._is_unsigned else None
        points = part(parts, "x_zero_point", self.name, ("U8", "I8"))
        count = grid[0] * grid[1]
        _packed_size(points, "x_zero_point", -(-count * self.kind.bits // 8))
        stored = unpack_bits(points.data.reshape(1, -1), self.kind.bits)[0, :count]
        return self._upright(self._signed(stored), grid).astype(np.int16)

    def recode(self, parts: Parts, codes: Codes) -> RawTensor:
        size, x = self.kind.bits, parts[self.codes_in]
        flat = np.ascontiguousarray(codes.T if self.transposed else codes).reshape(1, -1)
        if self.kind.is_float:
            stored = flat
        elif self._is_unsigned:
            stored = uncentred(flat, size)
        else:
            stored = flat.view(np.uint8) & np.uint8((1 << size) - 1)
        stream = pack_bits(stored, size, x.data.size)
        return RawTensor(dtype=x.dtype, shape=x.shape, data=stream.reshape(-1))


def _packed_size(tensor: RawTensor, role: str, nbytes: int) -> None:
    if tensor.data.size != nbytes:
        raise CheckpointError(
            f"{DequantizeLinear.name}: {role} has {tensor.data.size} bytes, not {nbytes}",
            fix="export the graph anew",
        )


def _sign_extended(stored: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.int8]:
    half = 1 << (size - 1)
    return ((stored ^ np.uint8(half)).astype(np.int16) - half).astype(np.int8)
