"""Pack a quantised weight as the constants of an ONNX operator, without changing a number.

Sources: com.microsoft MatMulNBits (ONNX Runtime's ContribOperators) and the ONNX operator
DequantizeLinear, opsets 21 (INT4, blocks) and 23 (FLOAT4E2M1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kilodelta.errors import ExportError
from kilodelta.export.quantised.nvfp4 import scale_pairs
from kilodelta.grid.bits import pack_bits
from kilodelta.grid.layouts.base import nibbles, uncentred
from kilodelta.grid.layouts.onnx_blocks import in_blocks
from kilodelta.grid.matrix import Floats, Matrix

Bytes = npt.NDArray[np.uint8]

TYPES = {"int4": "INT4", "int8": "INT8", "e4m3": "FLOAT8E4M3FN", "e2m1": "FLOAT4E2M1"}
"""Kinds of codes, and ONNX's names of the types that DequantizeLinear takes them in."""
_ONNX = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}
NBITS = (4, 8)
"""Bits that MatMulNBits is written for; ONNX Runtime 1.32 also runs 2."""
_BLOCK = 16
"""The smallest block of MatMulNBits; every block is a power of two."""


@dataclass(frozen=True, kw_only=True)
class Constant:
    """One constant of a graph: ONNX's name of its type, its shape, and its packed bytes."""

    type: str
    shape: tuple[int, ...]
    data: Bytes


@dataclass(frozen=True, kw_only=True)
class Constants:
    """The constants of one weight, and the attributes of the node that reads them.

    Attributes:
        codes: `B` of MatMulNBits, `x` of DequantizeLinear.
        scales: in the type that the graph computes in.
        whole: of E2M1 codes, the one number that their scales, E4M3 numbers, are times.
        zeros: zero points; None where all are zero.
        minima: (blocks, out), what each weight of a block has beside its scaled code; None if it
            is nothing. No operator takes them: products of theirs are added.
        attributes: of the node.
    """

    codes: Constant
    scales: Constant
    whole: Constant | None = None
    zeros: Constant | None = None
    minima: Constant | None = None
    attributes: dict[str, int] = field(default_factory=dict)


def require_exact(name: str, matrix: Matrix, dtype: str) -> None:
    """Check that a graph can hold a weight as it is.

    Args:
        name: the weight's, for the error.
        matrix: the weight.
        dtype: what the graph computes in, "float32", "float16" or "bfloat16".

    Raises:
        ExportError: ONNX has no type for its codes, its columns are out of order, a zero point lies
            outside the type of the codes, or a scale is no number of `dtype`.
    """
    kind, zeros = matrix.kind, matrix.zeros
    if kind.name not in TYPES:
        raise ExportError(
            f"{name} holds {kind.name} codes, of which no ONNX operator makes weights",
            fix="quantise to int4, int8 or fp8 (`kilodelta.grid.quantise`), or merge into the"
            " checkpoint for a server that reads it",
        )
    if matrix.order is not None:
        raise ExportError(
            f"{name} has its columns in groups out of order (g_idx, act-order), and ONNX operators"
            " take consecutive columns",
            fix="quantise without act-order (desc_act), or merge into the checkpoint",
        )
    if matrix.minima is not None and not are_floats(matrix.minima, dtype):
        raise ExportError(
            f"{name} has minima that are no numbers of {dtype}, so the graph would compute with"
            " other weights",
            fix=_in_fp32(dtype, "quantise its values anew (docs/quantised.md)"),
        )
    if zeros is not None and (zeros.min() < kind.low or zeros.max() > kind.high):
        raise ExportError(
            f"{name} has zero points from {zeros.min()} to {zeros.max()}, outside {kind.name}",
            fix="quantise anew: its writer let zero points leave the range of the codes",
        )
    if kind.name == "e2m1":
        if next(_pairs(matrix, dtype), None) is None:
            raise ExportError(
                f"{name} has NVFP4 scales that are not E4M3 numbers times one number of {dtype},"
                " as a graph holds them",
                fix=_in_fp32(dtype, "quantise by kilodelta.grid.quantise to nvfp4"),
            )
        if dtype == "float32":
            return  # a product of the two is rounded once, as every weight is
    if not are_floats(matrix.steps, dtype):
        raise ExportError(
            f"{name} has scales that are no numbers of {dtype}, so the graph would compute with"
            " other weights",
            fix=_in_fp32(dtype, "quantise with scales in that type"),
        )


def _in_fp32(dtype: str, other: str) -> str:
    """Say what to do where a type holds less than float32 does."""
    return other if dtype == "float32" else f"export with --dtype fp32, or {other}"


def require_runnable(name: str, matrix: Matrix) -> None:
    """Check that ONNX Runtime computes with a weight's codes on a CPU.

    Args:
        name: the weight's.
        matrix: the weight.

    Raises:
        ExportError: they are E2M1 numbers, of which only engines are built.
    """
    if matrix.kind.name == "e2m1":
        raise ExportError(
            f"{name} holds NVFP4 codes, with which ONNX Runtime computes on no CPU",
            fix="build an engine (export --tensorrt sm120, bundle --engine sm120), quantise to"
            " int4, int8 or fp8 (`kilodelta.grid.quantise`), or merge into the checkpoint for a"
            " server that reads it",
        )


def require_no_minima(name: str, matrix: Matrix) -> None:
    """Check that a weight which is to be dequantised whole has no minima.

    Args:
        name: the weight's, for the error.
        matrix: the weight.

    Raises:
        ExportError: it has, and DequantizeLinear takes zero points alone.
    """
    if matrix.minima is not None and matrix.minima.any():
        raise ExportError(
            f"{name} has blocks with minima (as Q4_1 and Q4_K have), of which only products by"
            " MatMulNBits in float32 and float16 are made, not DequantizeLinear",
            fix="leave --blocks, --tensorrt and --dtype bf16 out; a weight that is looked up, such"
            " as an embedding, has to be of another type (Q8_0)",
        )


def are_floats(values: Floats, dtype: str) -> bool:
    """Return whether a type of floats holds all values exactly."""
    return np.array_equal(_floats(values, dtype).astype(np.float64), values)


def fits_nbits(matrix: Matrix) -> bool:
    """Return whether MatMulNBits takes a weight: integers in blocks of 16, 32, ... columns."""
    rows, columns = matrix.block
    group = min(columns, matrix.shape[1])
    is_block = group >= _BLOCK and not group & (group - 1)
    return rows == 1 and is_block and matrix.kind.bits in NBITS and not matrix.kind.is_float


def matmul_nbits(matrix: Matrix, dtype: str) -> Constants:
    """Pack a weight (out, in) for `MatMulNBits`, which computes x (..., in) times its transpose.

    Args:
        matrix: for which `fits_nbits` holds.
        dtype: of the scales.

    Example:
        >>> from kilodelta.grid.codes import integer_kind
        >>> codes = np.arange(-8, 8, dtype=np.int8)[None]
        >>> one = Matrix(kind=integer_kind(4), codes=codes, steps=np.ones((1, 1)), block=(1, 16))
        >>> matmul_nbits(one, "float32").codes.data.tolist()
        [16, 50, 84, 118, 152, 186, 220, 254]
    """
    (rows, columns), bits = matrix.shape, matrix.kind.bits
    group = min(matrix.block[1], columns)
    groups = -(-columns // group)
    stream = pack_bits(uncentred(matrix.codes, bits), bits, groups * group * bits // 8)
    zeros = None
    if matrix.zeros is not None and matrix.zeros.any():
        unsigned = uncentred(matrix.zeros.astype(np.int8), bits)
        nbytes = -(-groups * bits // 8)
        zeros = _constant("UINT8", (rows, nbytes), pack_bits(unsigned, bits, nbytes))
    minima = None
    if matrix.minima is not None and matrix.minima.any():
        minima = _scales(np.ascontiguousarray(matrix.minima.T), dtype)
    return Constants(
        codes=_constant("UINT8", (rows, groups, group * bits // 8), stream),
        scales=_scales(matrix.steps, dtype),
        zeros=zeros,
        minima=minima,
        # 1: products in float32; 0 and 4 may let a runtime round the activations to int8.
        attributes={"K": columns, "N": rows, "bits": bits, "block_size": group,
                    "accuracy_level": 1},
    )  # fmt: skip


def block_sums(columns: int, group: int, dtype: str) -> Constant:
    """Make the matrix (columns, blocks) by which x (..., columns) becomes its sum over each block.

    Args:
        columns: of the weight.
        group: of a block; the last one may be cut.
        dtype: what the graph computes in.
    """
    return _scales(in_blocks(columns, group).astype(np.float64), dtype)


def dequantize_linear(matrix: Matrix, dtype: str) -> Constants:
    """Pack a weight (out, in) for `DequantizeLinear`, in the shape that it has.

    Args:
        matrix: for which `require_exact` and `require_no_minima` hold.
        dtype: of the scales, and so of what comes out.
    """
    kind, type_ = matrix.kind, TYPES[matrix.kind.name]
    if kind.name == "e2m1":
        return _two_levels(matrix, dtype)
    steps, attributes = _by_axis(matrix, matrix.steps)
    zeros = None
    if matrix.zeros is not None and matrix.zeros.any():
        points, _ = _by_axis(matrix, matrix.zeros.astype(np.int8))
        zeros = _packed(type_, points, kind.bits)
    codes = nibbles(matrix.codes, kind) if kind.bits == 4 else matrix.codes
    return Constants(
        codes=_packed(type_, codes, kind.bits),
        scales=_scales(steps, dtype),
        zeros=zeros,
        attributes=attributes,
    )


def _two_levels(matrix: Matrix, dtype: str) -> Constants:
    codes, whole = next(_pairs(matrix, dtype))
    scales, attributes = _by_axis(matrix, codes)
    return Constants(
        codes=_packed(TYPES["e2m1"], matrix.codes, 4),
        scales=_constant(TYPES["e4m3"], scales.shape, scales),
        whole=_scales(np.array(whole), dtype),
        attributes=attributes,
    )


def _pairs(matrix: Matrix, dtype: str) -> Iterator[tuple[Bytes, float]]:
    """Yield the ways to write NVFP4's steps as E4M3 codes times one number of a dtype."""
    pairs = scale_pairs(matrix.steps) if (matrix.steps >= 0).all() else iter(())
    return (pair for pair in pairs if pair[1] and are_floats(np.array(pair[1]), dtype))


def _by_axis(matrix: Matrix, values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], dict[str, int]]:
    """Bring one value per block into the shape that the operator wants, with its attributes.

    The operator has blocks along one axis, so a block of several rows counts as that many. Of
    integers a scale per row is a block as long as the row: ONNX Runtime 1.32 takes a product with
    one scale per tensor or row in int8, with activations rounded (5e-3), but not one with blocks.
    """
    rows, columns = matrix.shape
    tall, wide = min(matrix.block[0], rows), min(matrix.block[1], columns)
    if (tall, wide) == (rows, columns) and matrix.kind.is_float:
        return values.reshape(()), {}
    spread = values[np.arange(rows) // tall]
    if wide == columns and matrix.kind.is_float:
        return spread.reshape(rows), {"axis": 0}
    return spread, {"axis": 1, "block_size": wide}


def _packed(type_: str, values: npt.NDArray[Any], bits: int) -> Constant:
    """Pack integers or E4M3 codes as one flat stream over all rows, low bits first."""
    flat = np.ascontiguousarray(values).reshape(1, -1).view(np.uint8)
    if bits == 4:
        flat = pack_bits(flat & np.uint8(15), 4, -(-flat.size // 2))
    return _constant(type_, values.shape, flat)


def _scales(steps: Floats, dtype: str) -> Constant:
    return _constant(_ONNX[dtype], steps.shape, _floats(steps, dtype))


def _floats(steps: Floats, dtype: str) -> npt.NDArray[Any]:
    if dtype == "bfloat16":
        import ml_dtypes

        return steps.astype(ml_dtypes.bfloat16)
    with np.errstate(over="ignore"):  # an infinity is no step, which `require_exact` sees
        return steps.astype(dtype)


def _constant(type_: str, shape: tuple[int, ...], values: npt.NDArray[Any]) -> Constant:
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return Constant(type=type_, shape=shape, data=data)
