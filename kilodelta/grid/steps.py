"""Prepare the steps of a matrix for the kernels that round to its grid (`exact.nearest`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kilodelta.errors import CheckpointError
from kilodelta.exact.in_grid import split_steps
from kilodelta.exact.nearest import MANTISSA
from kilodelta.grid.codes import NOT_A_NUMBER, Kind
from kilodelta.grid.matrix import Matrix

Int64s = npt.NDArray[np.int64]


class StepParts(NamedTuple):
    """Steps of some rows, sign * M * 2^E; each (rows, groups) but the last.

    `shifts` is s = e + 1 - unit - E, and `inverses` float64 of 2^s / M; of a step of zero the sign
    is 0. `groups` is the group of each column, (in,).
    """

    signs: Int64s
    mantissas: Int64s
    shifts: Int64s
    inverses: npt.NDArray[np.float64]
    groups: Int64s


def step_parts(matrix: Matrix, e: int, rows: slice) -> StepParts:
    """Split the steps of some rows.

    Args:
        matrix: whose.
        e: the exponent of the update's unit.
        rows: consecutive rows of the weight.

    Raises:
        CheckpointError: a step has more than 32 significant bits, which no layout stores.
    """
    steps = matrix.steps[np.arange(matrix.shape[0])[rows] // matrix.block[0]]
    signs, mantissas, shifts = (np.empty(steps.shape, np.int64) for _ in range(3))
    inverses = np.empty(steps.shape)
    base = e + 1 - matrix.kind.unit
    if split_steps(steps, base, signs, mantissas, shifts, inverses) >= MANTISSA:
        raise CheckpointError(
            "a scale has more than 32 significant bits, so it is no product of two stored scales",
            fix="the file is damaged: fetch it again",
        )
    return StepParts(
        signs=signs,
        mantissas=mantissas,
        shifts=shifts,
        inverses=inverses,
        groups=matrix.groups,
    )


def table_of(kind: Kind) -> tuple[Int64s, Int64s]:
    """Return what the codes of a float kind stand for, and the midpoints between positive ones.

    Example:
        >>> from kilodelta.grid.codes import E2M1
        >>> table_of(E2M1)[1].tolist()
        [1, 3, 5, 7, 10, 14, 20]
    """
    codes: npt.NDArray[Any] = np.arange(1 << kind.bits, dtype=np.uint8)
    table = kind.integers(codes).astype(np.int64)
    positive = table[: 1 << (kind.bits - 1)]
    positive = positive[positive != NOT_A_NUMBER]
    return table, positive[:-1] + positive[1:]
