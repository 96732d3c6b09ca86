"""Compute the logical root of a quantised model: the same for every layout of the same numbers.

Hashed are, per weight, its name, kind, shape, block, codes, steps, zero points, minima and column
order as `Matrix` has them. So a scale of 0.5 is one number in float16 and float32, -0.0 is 0.0,
and codes that pad a row or a block are not there (docs/format.md, section 10).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kilodelta.errors import CheckpointError, one_line
from kilodelta.files import canonical
from kilodelta.files.identity import Hash
from kilodelta.grid.matrix import Matrix

DOMAIN = b"kilodelta grid 1"
_PIECE = 1 << 14
"""Steps hashed at a time: they stay in the second cache."""


def matrix_digest(name: str, matrix: Matrix, state: Hash | None = None) -> str:
    """Compute the logical digest of one weight under its name, `sha256:<hex>`.

    Args:
        name: of the weight.
        matrix: the weight.
        state: what `matrix_hash` has made of it, if that is at hand; it is used up.

    Example:
        >>> from dataclasses import replace
        >>> from kilodelta.grid.codes import integer_kind
        >>> half, codes = np.array([[0.5, -0.0]]), np.array([[1, -8, 0]], np.int8)
        >>> w = Matrix(kind=integer_kind(4), codes=codes, steps=half, block=(1, 2))
        >>> again = replace(w, steps=np.abs(half), zeros=np.zeros((1, 2), np.int16))
        >>> matrix_digest("w", w) == matrix_digest("w", again)
        True
    """
    state = matrix_hash(name, matrix) if state is None else state
    state.update(np.ascontiguousarray(matrix.kind.plus_zero(matrix.codes)).data)
    return "sha256:" + state.hexdigest()


def matrix_hash(name: str, matrix: Matrix) -> hashlib._Hash:
    """Start the hash of a weight with everything but its codes, which follow row by row."""
    state = hashlib.sha256()
    for part in matrix_parts(name, matrix):
        state.update(part)
    return state


def matrix_parts(name: str, matrix: Matrix) -> Iterator[bytes | memoryview]:
    """Yield what is hashed of a weight before its codes, piece by piece."""
    rows, columns = matrix.shape
    block = (min(matrix.block[0], rows), min(matrix.block[1], columns))
    order = matrix.order
    if order is not None and np.array_equal(order, np.arange(columns) // block[1]):
        order = None
    head = (
        DOMAIN, name.encode(), matrix.kind.name.encode(), f"{rows},{columns}".encode(),
        f"{block[0]},{block[1]}".encode(),
        _state(matrix.zeros) + _state(matrix.minima) + (b"0" if order is None else b"1"), b"",
    )  # fmt: skip
    yield b"\0".join(head)
    steps = matrix.steps.reshape(-1)
    for start in range(0, steps.size, _PIECE):  # a copy of all of them would take new memory
        yield _bytes(steps[start : start + _PIECE], "<f8")
    for values, dtype in ((matrix.zeros, "<i2"), (matrix.minima, "<f8")):
        if values is not None and values.any():
            yield _bytes(values, dtype)
    if order is not None:
        yield _bytes(order, "<i4")


def kind_text(matrix: Matrix) -> str:
    """Say what a weight is: the kind of its codes and the block that shares a step.

    Example:
        >>> from kilodelta.grid.codes import integer_kind
        >>> steps, codes = np.ones((2, 1)), np.zeros((2, 3), np.int8)
        >>> kind_text(Matrix(kind=integer_kind(4), codes=codes, steps=steps, block=(1, 128)))
        'int4 1x3'
    """
    rows, columns = matrix.shape
    return f"{matrix.kind.name} {min(matrix.block[0], rows)}x{min(matrix.block[1], columns)}"


def _state(values: npt.NDArray[Any] | None) -> bytes:
    return b"1" if values is not None and values.any() else b"0"


def _bytes(values: npt.NDArray[Any], dtype: str) -> memoryview:
    return np.ascontiguousarray(values + 0, dtype=dtype).reshape(-1).data  # -0.0 + 0 is 0.0


def config_digest(config: Mapping[str, Any]) -> str:
    """Compute the digest of a quantisation configuration, as canonical JSON.

    Raises:
        CheckpointError: it holds what canonical JSON cannot: NaN, infinity, half of a surrogate.
    """
    try:
        text = canonical.dumps(dict(config)).encode("utf-8")
    except ValueError as error:
        raise CheckpointError(
            f"the quantisation configuration has no canonical spelling: {one_line(error)}",
            fix="fetch the model again: NaN, infinity and halves of surrogates are no JSON",
        ) from None
    return "sha256:" + hashlib.sha256(text).hexdigest()
