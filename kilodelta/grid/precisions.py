"""Round weights to nearest in a grid of our own making: INT4 in groups, NVFP4, FP8.

A scale per block from the largest weight in it; nothing is calibrated. What is written here is the
whole algorithm (docs/format.md, section 10), so every machine and every release makes the same
codes; a library's quantiser may change with its version. All quotients are float64, which decides
each nearest number as exact arithmetic would: weights and steps have 24 significant bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from kilodelta.files.tensor import RawTensor
from kilodelta.grid.bits import pack_bits
from kilodelta.grid.codes import E2M1, E4M3, Kind, e4m3_values, integer_kind
from kilodelta.grid.layouts.base import uncentred
from kilodelta.grid.matrix import Floats, Matrix, Shape
from kilodelta.grid.steps import float_grid

Tensors = dict[str, RawTensor]

FLOAT32 = "float32"
SCALES = (FLOAT32, "float16")
"""Types of scales; a graph that computes in float16 has to have float16 ones."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """One way to quantise: `make` from float64 weights (out, in) to the matrix, `store` to its
    stored tensors by their last names, and the configuration of the folder. Both are told the
    dtype of scales, which NVFP4 leaves alone: its scales are E4M3 numbers."""

    make: Callable[..., Matrix]
    store: Callable[..., Tensors]
    config: Mapping[str, Any]
    group: int
    """Columns that share a scale; a weight's columns have to be a multiple. 1: no condition."""
    bits: int
    """Of a code."""
    scale_bytes: int = 0
    """Of a scale, where it has one type whatever is given; 0 where it is given."""

    def nbytes(self, shape: tuple[int, ...], scales: str = FLOAT32) -> int:
        """Count the bytes of a stored weight, but for the few of its shape or global scale.

        Args:
            shape: (out, in).
            scales: one of `SCALES`.
        """
        weights = prod(shape)
        count = weights // self.group if self.group > 1 else 1  # or one scale for all
        width = self.scale_bytes or np.dtype(scales).itemsize
        return weights * self.bits // 8 + count * width


def nearest_codes(kind: Kind, quotients: Floats) -> npt.NDArray[Any]:
    """Return the codes of the numbers nearest to weights over steps, ties to even, clamped.

    Args:
        kind: what codes are.
        quotients: float64, of any shape; finite.

    Example:
        >>> nearest_codes(E2M1, np.array([0.2, 0.25, -2.5, 99.0])).tolist()
        [0, 0, 12, 7]
    """
    if not kind.is_float:
        return np.asarray(np.clip(np.rint(quotients), kind.low, kind.high).astype(np.int8))
    middles = float_grid(kind).middles
    halves = np.ldexp(np.abs(quotients), 1 - kind.unit)
    low = np.searchsorted(middles, halves, side="left")
    tie = middles[np.minimum(low, middles.size - 1)] == halves
    codes = (low + (tie & (low % 2 == 1))).astype(np.uint8)
    sign = np.uint8(1 << (kind.bits - 1))
    return np.asarray(np.where((quotients < 0) & (codes > 0), codes | sign, codes))


def with_steps(like: Matrix, values: Floats) -> Matrix:
    """Round float weights to a grid that is given: the steps and zero points of `like`.

    Args:
        like: whose grid.
        values: float64 (out, in).
    """
    steps = like.spread(like.steps)
    moved = values if like.minima is None else values - like.spread(like.minima)
    quotients = np.divide(moved, steps, out=np.zeros_like(moved), where=steps != 0)
    zeros = like.zeros
    if zeros is None:
        codes = nearest_codes(like.kind, quotients)
    else:
        rounded = np.rint(quotients) + like.spread(zeros)
        codes = np.clip(rounded, like.kind.low, like.kind.high).astype(np.int8)
    codes = np.where(steps == 0, like.codes, codes)
    return Matrix(kind=like.kind, codes=codes, steps=like.steps, block=like.block, zeros=zeros,
                  minima=like.minima, order=like.order)  # fmt: skip


def _largest(values: Floats, group: int) -> Floats:
    rows, columns = values.shape
    largest: Floats = np.abs(values).reshape(rows, columns // group, group).max(axis=2)
    return largest


def _as_scales(steps: Floats, dtype: str) -> Floats:
    """Round steps to the dtype that they are stored in."""
    with np.errstate(over="ignore"):  # an infinity is refused, by the weight's name
        rounded: Floats = steps.astype(dtype).astype(np.float64)
    return rounded


def _matrix(kind: Kind, values: Floats, steps: Floats, block: Shape) -> Matrix:
    blank = Matrix(kind=kind, codes=np.zeros(values.shape, kind.dtype), steps=steps, block=block)
    return with_steps(blank, values)


def _int4(group: int) -> Precision:
    def make(values: Floats, scales: str = FLOAT32) -> Matrix:
        steps = _as_scales(_largest(values, group) / 7, scales)
        return _matrix(integer_kind(4), values, steps, (1, group))

    def store(matrix: Matrix, scales: str = FLOAT32) -> Tensors:
        rows, columns = matrix.shape
        words = pack_bits(uncentred(matrix.codes, 4), 4, -(-columns // 8) * 4)
        return {
            "weight_packed": RawTensor.of(words.view("<i4")),
            "weight_scale": RawTensor.of(matrix.steps.astype(scales)),
            "weight_shape": RawTensor.of(np.array([rows, columns], np.int64)),
        }

    args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    return Precision(
        make=make,
        store=store,
        config=_config("pack-quantized", {**args, "group_size": group}),
        group=group,
        bits=4,
    )


def _nvfp4() -> Precision:
    def make(values: Floats, scales: str = FLOAT32) -> Matrix:
        top = float(np.abs(values).max(initial=0.0))
        # A power of two, so that ModelOpt's spelling and compressed-tensors' are one model.
        whole = 2.0 ** np.ceil(np.log2(top / (6 * 448))) if top else 1.0
        codes = nearest_codes(E4M3, _largest(values, 16) / 6 / whole)
        steps = e4m3_values(codes) * whole
        return _matrix(E2M1, values, steps, (1, 16))

    def store(matrix: Matrix, scales: str = FLOAT32) -> Tensors:
        largest = float(matrix.steps.max(initial=0.0))
        # Any power of two under which every step is an E4M3 number will do: of the largest one.
        whole = 2.0 ** np.ceil(np.log2(largest / 448)) if largest else 1.0
        steps = nearest_codes(E4M3, matrix.steps / whole)
        if not np.array_equal(e4m3_values(steps) * whole, matrix.steps):
            whole = whole * 2.0
            steps = nearest_codes(E4M3, matrix.steps / whole)
        return {
            "weight_packed": RawTensor.of(pack_bits(matrix.codes, 4, matrix.shape[1] // 2)),
            "weight_scale": RawTensor(dtype="F8_E4M3", shape=steps.shape, data=steps.reshape(-1)),
            "weight_global_scale": RawTensor.of(np.array([1 / whole], np.float32)),
        }

    args = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    config = _config("nvfp4-pack-quantized", {**args, "symmetric": True})
    return Precision(make=make, store=store, config=config, group=16, bits=4, scale_bytes=1)


def _fp8() -> Precision:
    def make(values: Floats, scales: str = FLOAT32) -> Matrix:
        steps = _as_scales(np.abs(values).max(initial=0.0, keepdims=True) / 448, scales)
        return _matrix(E4M3, values, steps, values.shape)

    def store(matrix: Matrix, scales: str = FLOAT32) -> Tensors:
        codes = matrix.codes.reshape(-1)
        return {
            "weight": RawTensor(dtype="F8_E4M3", shape=matrix.shape, data=codes),
            "weight_scale": RawTensor.of(matrix.steps.reshape(1).astype(scales)),
        }

    args = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
    config = _config("float-quantized", args)
    return Precision(make=make, store=store, config=config, group=1, bits=8)


def _config(form: str, weights: dict[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
    }


PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {
        "int4-g32": _int4(32),
        "int4-g64": _int4(64),
        "int4-g128": _int4(128),
        "nvfp4": _nvfp4(),
        "fp8": _fp8(),
    }
)
"""By name: what `kilodelta.grid.quantise.quantise_folder` makes."""
