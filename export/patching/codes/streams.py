"""Lay a quantised weight out as `DequantizeLinear` takes it: one stream of codes, one of scales.

Two files hold weights so: the rest of a base, for what a model does not hold, and engines, which
keep (out, in) or (in, out).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kilodelta.export.patching.codes.places import REST, CodePlaces
from kilodelta.export.patching.map import FilePlace
from kilodelta.export.quantised.constants import Constant, dequantize_linear
from kilodelta.files.dtypes import DTYPES
from kilodelta.files.tensor import RawTensor
from kilodelta.grid.layouts import DequantizeLinear, Parts
from kilodelta.grid.matrix import Matrix

_DTYPES = {
    "FLOAT": "F32", "FLOAT16": "F16", "BFLOAT16": "BF16", "FLOAT8E4M3FN": "F8_E4M3",
}  # fmt: skip
"""ONNX's names of types, and safetensors'; integers are U8 here, of packed bytes."""


def streams(
    matrix: Matrix, dtype: str, *, transposed: bool = False
) -> tuple[DequantizeLinear, dict[str, RawTensor]]:
    """Lay out a weight, which `require_exact` takes in this dtype.

    Args:
        matrix: the weight, (out, in).
        dtype: of the scales: "float32", "float16" or "bfloat16".
        transposed: lay out (in, out); only for weights without zero points.

    Returns:
        The layout, and its parts by role.

    Example:
        >>> from kilodelta.grid.codes import integer_kind
        >>> codes, steps = np.array([[1, 2], [3, 4]], np.int8), np.ones((2, 1))
        >>> weight = Matrix(kind=integer_kind(4), codes=codes, steps=steps, block=(1, 2))
        >>> [streams(weight, "float32", transposed=t)[1]["x"].data.tolist() for t in (False, True)]
        [[33, 67], [49, 66]]
    """
    made = dequantize_linear(matrix, dtype)
    axis, wide = made.attributes.get("axis"), made.attributes.get("block_size")
    block = (1, wide) if wide else (1, matrix.shape[1]) if axis == 0 else matrix.shape
    layout = DequantizeLinear(
        shape=matrix.shape, type=made.codes.type, transposed=transposed, block=block
    )
    parts = {"x": _raw(made.codes), "x_scale": _raw(made.scales)}
    whole = {} if made.whole is None else {"x_scale_scale": replace(_raw(made.whole), shape=(1,))}
    if made.zeros is not None:
        parts["x_zero_point"] = _raw(made.zeros)
    if transposed:
        grid = matrix.shape[0] // block[0], matrix.shape[1] // block[1]
        parts = {
            "x": layout.recode(parts, matrix.codes),
            "x_scale": _turned(parts["x_scale"], grid),
        }
    return layout, parts | whole


def _turned(scales: RawTensor, grid: tuple[int, int]) -> RawTensor:
    values = scales.data.view(DTYPES[scales.dtype].storage).reshape(grid)
    data = np.ascontiguousarray(values.T).reshape(-1).view(np.uint8)
    return RawTensor(dtype=scales.dtype, shape=grid[::-1], data=data)


def _raw(constant: Constant) -> RawTensor:
    dtype = _DTYPES.get(constant.type, "U8")
    is_float = constant.type in ("FLOAT", "FLOAT16", "BFLOAT16")
    shape = constant.shape if is_float else (constant.data.size,)
    return RawTensor(dtype=dtype, shape=shape, data=constant.data)


def in_rest(name: str, matrix: Matrix) -> CodePlaces:
    """Describe a weight that the model does not hold at all.

    Args:
        name: the weight's.
        matrix: the weight, which `require_exact` takes in float32.
    """
    layout, parts = streams(matrix, "float32")
    places = {role: rest_place(name, role, part) for role, part in parts.items()}
    return CodePlaces(layout=layout, block=matrix.block, parts=places)


def rest_place(name: str, role: str, part: RawTensor, *, transposed: bool = False) -> FilePlace:
    """Name a part that the model does not hold, in the rest of the base.

    Args:
        name: of the weight.
        role: of the part in its layout, such as its scales.
        part: gives dtype and shape.
        transposed: whether the rest holds it in the other order.
    """
    return FilePlace(
        name=f"{name}:{role}" + (":transposed" if transposed else ""),
        dtype=part.dtype,
        shape=part.shape,
        file=REST,
        begin=0,
        transposed=False,
        top=False,
    )


def parts_in_rest(copy: CodePlaces, matrix: Matrix) -> Parts:
    """Return the parts of a copy that the rest of the base holds, by their names in it.

    Args:
        copy: of a weight.
        matrix: the weight.
    """
    lacking = {role: part for role, part in copy.parts.items() if part.file == REST}
    is_turned = isinstance(copy.layout, DequantizeLinear) and copy.layout.transposed
    _, own = streams(matrix, "float32", transposed=is_turned)
    return {part.name: own[role] for role, part in lacking.items()}
