"""Say which grids TensorRT-RTX builds engines of, and refuse the others by their reason.

Each row was built, or refused while parsing, by TensorRT-RTX 1.7.1 without a GPU; whether a GPU
computes right is what `verify` shows where one is. TensorRT proper has not been tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from kilodelta.errors import ExportError
from kilodelta.grid.matrix import Matrix

LEAST: Mapping[str, tuple[int, str]] = MappingProxyType(
    {"int4": (80, "INT4"), "int8": (75, "INT8"), "e4m3": (89, "FP8"), "e2m1": (120, "NVFP4")}
)
"""By kind of codes: the least compute capability, and what NVIDIA calls them."""
BLOCKS = (16, 32, 64, 128)
"""Columns of an INT4 block."""
NVFP4_BLOCK = 16
"""Columns of an NVFP4 block, by its definition."""
_WAYS = (
    "quantise to FP8 (symmetric, one scale), export a float16 model, or leave the engine out: ONNX"
    " Runtime runs the graph"
)
_ANEW = (
    "leave the engine out: ONNX Runtime runs the graph; or quantise its values anew, symmetrically,"
    " by kilodelta.grid.quantise.quantise_folder(BASE, 'base-int4/', 'int4-g32', CHOOSES,"
    " scales='float16'), where CHOOSES says of a weight's name whether to, and kilodelta rebase"
    " base-int4/ FILE -o NEW.kd (docs/quantised.md)"
)


def require_engine(name: str, matrix: Matrix, capabilities: Sequence[str]) -> None:
    """Refuse a weight of which no engine can be built.

    Args:
        name: the weight's.
        matrix: the weight.
        capabilities: GPUs to build for, such as `("sm86", "sm89")`.

    Raises:
        ExportError: the GPUs lack its codes, it has minima or zero points, or its blocks are none
            that TensorRT takes.
    """
    kind = matrix.kind.name
    if kind not in LEAST:
        raise ExportError(f"{name} holds {kind} codes, of which no engine is built", fix=_WAYS)
    least, called = LEAST[kind]
    lacking = [sm for sm in capabilities if int(sm.removeprefix("sm")) < least]
    ways = _WAYS if kind != "e2m1" else "quantise to FP8 or INT4, or export a float16 model"
    if lacking:
        raise ExportError(
            f"{name} holds {called} codes, which TensorRT builds from sm{least} on, not for"
            f" {', '.join(lacking)}",
            fix=f"build for sm{least} and newer, or {ways}",
        )
    if matrix.minima is not None and matrix.minima.any():
        raise ExportError(
            f"{name} has blocks with minima (as Q4_1 and Q4_K have). A minimum is no multiple of"
            " the scale, so that not even a zero point stands for it, and TensorRT takes neither",
            fix=_ANEW,
        )
    if matrix.zeros is not None and matrix.zeros.any():
        raise ExportError(
            f"{name} has zero points (it is quantised asymmetrically), and TensorRT takes none",
            fix=_WAYS,
        )
    if kind == "e2m1" and matrix.block != (1, NVFP4_BLOCK):
        raise ExportError(
            f"{name} has {called} blocks of {matrix.block[1]} columns; TensorRT builds blocks of"
            f" {NVFP4_BLOCK}",
            fix=ways,
        )
    if kind in ("int8", "e4m3") and (matrix.steps <= 0).any():
        raise ExportError(
            f"{name} has {called} scales that are negative or zero, which TensorRT takes of INT4"
            " alone",
            fix=_WAYS,
        )
    columns = matrix.shape[1]
    group = min(matrix.block[1], columns)
    if columns % group:
        raise ExportError(
            f"{name} has {columns} columns in blocks of {group}, the last one partial, and TensorRT"
            " takes whole blocks",
            fix=_WAYS,
        )
    if kind == "int4" and group not in (*BLOCKS, columns):
        raise ExportError(
            f"{name} has INT4 blocks of {group} columns; TensorRT builds blocks of"
            f" {', '.join(map(str, BLOCKS))}",
            fix=_WAYS,
        )
