"""One quantised weight in the one form that every layout is read into, with its exact values.

    value[i, j] = step * (code[i, j] - zero) + minimum

with the step, zero point and minimum of the block that (i, j) lies in. A step is one float64 that
holds the stored scale, or product of stored scales, exactly; so the value is an exact rational, and
float64 holds it (`Matrix.values`). Codes are integers in units of the kind (`codes.Kind`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kilodelta.errors import CheckpointError
from kilodelta.grid.codes import NOT_A_NUMBER, Kind

Floats = npt.NDArray[np.float64]
Shape = tuple[int, int]

_FETCH = "the file is damaged, or written by a tool that failed: fetch it again"


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A quantised weight of shape (out, in).

    Attributes:
        kind: what a code is.
        codes: (out, in), of the kind's dtype; signed and centred for integers.
        steps: float64 (ceil(out / block[0]), ceil(in / block[1])), of any sign; zero is valid.
        block: rows and columns that share a step.
        zeros: int16, of the shape of `steps`, in the same centred count as the codes; None is 0.
        minima: float64, of the shape of `steps` (GGUF's Q4_1 and K-quants); None is 0.
        order: int32 (in,), the group of each column (GPTQ's act-order); None: column // block[1].
    """

    kind: Kind
    codes: npt.NDArray[Any]
    steps: Floats
    block: Shape
    zeros: npt.NDArray[np.int16] | None = None
    minima: Floats | None = None
    order: npt.NDArray[np.int32] | None = None

    @property
    def shape(self) -> Shape:
        """(out, in)."""
        rows, columns = self.codes.shape
        return rows, columns

    @property
    def groups(self) -> npt.NDArray[np.int64]:
        """The column of `steps` that each column of the weight uses, int64 (in,)."""
        if self.order is not None:
            return self.order.astype(np.int64)
        return np.arange(self.shape[1]) // self.block[1]

    def spread(self, values: npt.NDArray[Any], rows: slice = slice(None)) -> npt.NDArray[Any]:
        """Repeat one value per block (the shape of `steps`) for each weight of some rows."""
        tall = np.arange(self.shape[0])[rows] // self.block[0]
        spread: npt.NDArray[Any] = values[tall][:, self.groups]
        return spread

    def values(self, rows: slice = slice(None)) -> Floats:
        """Return the exact values of some rows, float64 (rows, in).

        Example:
            >>> from kilodelta.grid.codes import E2M1
            >>> codes = np.array([[1, 15]], np.uint8)
            >>> Matrix(kind=E2M1, codes=codes, steps=np.array([[-2.0]]), block=(1, 2)).values()
            array([[-1., 12.]])
        """
        integers = self.kind.integers(self.codes[rows]).astype(np.float64)
        if self.zeros is not None:
            integers -= self.spread(self.zeros, rows)
        found: Floats = self.spread(np.ldexp(self.steps, self.kind.unit), rows) * integers
        if self.minima is not None:
            found += self.spread(self.minima, rows)
        return found + 0.0  # -0.0 + 0.0 is +0.0

    def checked(self, name: str) -> Matrix:
        """Return this matrix if every number in it is one.

        Args:
            name: the weight's, for the error.

        Raises:
            CheckpointError: a scale, minimum or code is NaN or infinite, a column belongs to a
                group that does not exist, or a block is larger than any matrix.
        """
        self.checked_codes(name, self.codes)
        return self.checked_grid(name)

    def checked_codes(self, name: str, codes: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return some of this weight's codes if each stands for a number; else as `checked`."""
        if self.kind.name == "e4m3" and (self.kind.integers(codes) == NOT_A_NUMBER).any():
            raise CheckpointError(f"{name}: a code is NaN, out of E4M3's range", fix=_FETCH)
        return codes

    def checked_grid(self, name: str) -> Matrix:
        """Return this matrix if every number but its codes is one; else as `checked`."""
        if max(self.block) >= 1 << 31:
            raise CheckpointError(
                f"{name}: a block of {self.block[0]} x {self.block[1]} is larger than any matrix",
                fix=_FETCH,
            )
        for what, floats in (("scale", self.steps), ("minimum", self.minima)):
            if floats is not None and not np.isfinite(floats).all():
                bad = np.argwhere(~np.isfinite(floats))[0]
                raise CheckpointError(
                    f"{name}: the {what} of block {tuple(map(int, bad))} is "
                    f"{floats[tuple(bad)]}, so its weights have no value",
                    fix=_FETCH,
                )
        count = self.steps.shape[1]
        if self.order is not None:
            wrong = self.order[(self.order < 0) | (self.order >= count)]
            if wrong.size:
                raise CheckpointError(
                    f"{name}: g_idx names group {wrong[0]} of {count}", fix=_FETCH
                )
        return self

    def in_blocks(self, block: Shape) -> Matrix | None:
        """Cut the same weight into larger blocks; None where those do not share a step.

        An ONNX operator has blocks along one axis, so it repeats the step of a block of several
        rows for each of them.

        Args:
            block: rows and columns, each at most the weight's or larger.

        Example:
            >>> from kilodelta.grid.codes import E2M1
            >>> codes, steps = np.zeros((2, 4), np.uint8), np.array([[1.0, 2.0], [1.0, 2.0]])
            >>> fine = Matrix(kind=E2M1, codes=codes, steps=steps, block=(1, 2))
            >>> fine.in_blocks((2, 2)).steps
            array([[1., 2.]])
            >>> fine.in_blocks((2, 4)) is None
            True
        """
        rows, columns = (min(a, b) for a, b in zip(block, self.shape, strict=True))
        own = tuple(min(a, b) for a, b in zip(self.block, self.shape, strict=True))
        if own == (rows, columns):
            return replace(self, block=(rows, columns))
        if self.order is not None or rows % own[0] or columns % own[1]:
            return None
        tall = np.arange(self.steps.shape[0]) * own[0] // rows
        wide = np.arange(self.steps.shape[1]) * own[1] // columns
        whole = np.ix_(np.unique(tall, return_index=True)[1], np.unique(wide, return_index=True)[1])

        def merged(values: npt.NDArray[Any] | None) -> npt.NDArray[Any] | None:
            return None if values is None else values[whole]

        found = replace(
            self,
            steps=self.steps[whole],
            block=(rows, columns),
            zeros=merged(self.zeros),
            minima=merged(self.minima),
        )
        pairs = ((self.steps, found.steps), (self.zeros, found.zeros), (self.minima, found.minima))
        alike = all(
            a is None or b is None or np.array_equal(a, b[np.ix_(tall, wide)]) for a, b in pairs
        )
        return found if alike else None

    @property
    def still(self) -> int:
        """How many blocks have a step of zero, whose weights no code can change."""
        return int(np.count_nonzero(self.steps == 0))

    @property
    def still_weights(self) -> int:
        """How many weights lie in such blocks."""
        return int(self.spread(self.steps == 0).sum()) if self.still else 0
