"""Prepare the grid of a matrix for the kernels that round to it (`exact.in_grid`)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kilodelta.errors import CheckpointError
from kilodelta.grid.codes import NOT_A_NUMBER, Kind
from kilodelta.grid.matrix import Matrix

Int64s = npt.NDArray[np.int64]


class Steps(NamedTuple):
    """The steps of a weight, and the update's unit in them.

    Attributes:
        values: float64 (blocks of rows, groups).
        groups: the group of each column, int64 (in,).
        width: columns of a group, where each group is that many neighbours; 0 for any order.
        scale: C 2^(e - unit): what one of dQ is, in units of the grid times the step.
        base: e + 1 - unit.
        tall: rows that share a step.
    """

    values: npt.NDArray[np.float64]
    groups: Int64s
    width: int
    scale: np.float64
    base: int
    tall: int

    def of_bytes(self) -> Steps:
        """Return the same for `exact.in_bytes`, whose groups and width are those of bytes."""
        return self._replace(groups=np.ascontiguousarray(self.groups[::2]), width=self.width // 2)


class FloatGrid(NamedTuple):
    """A small float type.

    Attributes:
        table: float32, what each code stands for, in units.
        highest: the greatest number.
        middles: int64, the midpoints between positive neighbours, in half units, ascending.
        mantissa: bits of its mantissa.
        sign: the bit of a code that is its sign.
    """

    table: npt.NDArray[np.float32]
    highest: np.float32
    middles: Int64s
    mantissa: np.uint32
    sign: np.uint32


def steps_of(matrix: Matrix, c: int, e: int) -> Steps:
    """Prepare the steps of a weight for an update 2^e C dQ.

    Args:
        matrix: the weight; its codes do not matter.
        c: the integer that dQ is multiplied by.
        e: the exponent of the update's unit.

    Raises:
        CheckpointError: a step has more than 32 significant bits, which no layout stores.
    """
    from kilodelta.exact.nearest import are_short  # numba, which no plan of a fleet needs

    values = np.ascontiguousarray(matrix.steps)
    if not are_short(values.view(np.int64)):
        raise CheckpointError(
            "a scale has more than 32 significant bits, so it is no product of two stored scales",
            fix="the file is damaged: fetch it again",
        )
    unit = matrix.kind.unit
    return Steps(
        values=values,
        groups=matrix.groups,
        width=0 if matrix.order is not None else matrix.block[1],
        scale=np.float64(np.ldexp(float(c), e - unit)),
        base=e + 1 - unit,
        tall=matrix.block[0],
    )


def limits_of(matrix: Matrix) -> npt.NDArray[Any]:
    """Return the `integer_limits` of a weight with integer codes."""
    from kilodelta.exact.quotients import integer_limits

    kind, zeros = matrix.kind, matrix.zeros
    least, most = (0, 0) if zeros is None else (int(zeros.min()), int(zeros.max()))
    return integer_limits(kind.low, kind.high, max(kind.high - least, most - kind.low))


@lru_cache(maxsize=4)
def float_grid(kind: Kind) -> FloatGrid:
    """Prepare a small float type.

    Example:
        >>> from kilodelta.grid.codes import E2M1
        >>> float_grid(E2M1).middles.tolist()
        [1, 3, 5, 7, 10, 14, 20]
    """
    codes: npt.NDArray[Any] = np.arange(1 << kind.bits, dtype=np.uint8)
    table = kind.integers(codes).astype(np.int64)
    positive = table[: 1 << (kind.bits - 1)]
    positive = positive[positive != NOT_A_NUMBER]
    # Numbers up to 2^(mantissa + 1) follow each other by one unit: subnormal ones, and a binade.
    return FloatGrid(
        table=table.astype(np.float32),
        highest=np.float32(positive[-1]),
        middles=positive[:-1] + positive[1:],
        mantissa=np.uint32(int((np.diff(positive) == 1).sum()).bit_length() - 2),
        sign=np.uint32(1 << (kind.bits - 1)),
    )
