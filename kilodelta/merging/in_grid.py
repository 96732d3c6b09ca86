"""Merge one target into the grid of a quantised base: its codes in, new codes out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kilodelta.exact import fused, in_bytes, in_grid, nibbles, products
from kilodelta.format.delta import Delta
from kilodelta.format.targets import Target
from kilodelta.grid.matrix import Matrix
from kilodelta.grid.steps import float_grid, limits_of, steps_of
from kilodelta.merging import cpu
from kilodelta.merging.quantised import MIN_CHANGED as MIN_CHANGED

BAND = 1 << 20
"""Elements whose update is in memory at a time."""
BYTES_BAND = 1 << 19
"""As many where two codes share a byte: they stay near until they are hashed and written."""


@dataclass(frozen=True, kw_only=True)
class Regridded:
    """A weight after a merge in the grid.

    Attributes:
        matrix: the new one, with the base's steps and zero points.
        changed: codes that stand for another number.
        steps: the sum of the update's magnitudes, each in steps of its block.
        still: weights in blocks with a step of zero, which nothing changes.
    """

    matrix: Matrix
    changed: int
    steps: float
    still: int


class Regridder:
    """What adds one target's update to rows of a quantised weight, and rounds to the base's grid.

    Args:
        delta: bound to the quantised base, of an exact method.
        target: one of its targets.
        grid: the weight; its codes do not matter.
        every: measure the update in every so many rows only, which is faster; 1 for all.
        packed: rows are given and taken as bytes of two codes (`round_bytes`), which
            `fits_bytes`.

    Raises:
        CheckpointError: a step is none that a layout can store.
    """

    def __init__(
        self, delta: Delta, target: Target, grid: Matrix, *, every: int = 1, packed: bool = False
    ) -> None:
        c, e = delta.scale(target.name)
        bound = delta.bound(target.name)
        e = e if bound else 0  # an update of zero may have any exponent
        self._factor = np.float64(c)
        steps = steps_of(grid, c, e)
        zeros = np.zeros((0, 0), np.int16) if grid.zeros is None else grid.zeros
        self._grid: tuple[Any, ...]
        if grid.kind.is_float:
            self._grid = (float_grid(grid.kind), steps.of_bytes() if packed else steps, every)
        elif packed:
            self._grid = (np.ascontiguousarray(zeros), steps.of_bytes(), every)
        else:
            self._grid = (np.ascontiguousarray(zeros), steps, limits_of(grid), every)
        self._left, right = cpu.stored_factors(delta, target)
        right = nibbles.halves(right) if packed else right
        self._inner, self._shape = right.shape[0], grid.shape
        self._dtype = fused.narrowest(bound)
        is_fused = self._inner <= fused.FEW
        if packed:
            self._kernel = in_bytes.MERGE[grid.kind.is_float]
        else:
            self._kernel = (in_grid.MERGE if is_fused else in_grid.ROUND)[grid.kind.is_float]
        if is_fused:
            self._right = np.ascontiguousarray(right, dtype=self._dtype)
        else:
            self._multiply = products.multiplier(right, bound)
        self._is_fused = is_fused

    def bands(self, elements: int = BAND) -> Iterator[tuple[range, Any]]:
        """Yield rows, `elements` at a time, with their part of the update's left factor."""
        rows, columns = self._shape
        return cpu.bands(self._left, rows, min(rows, max(1, elements // columns)), self._inner)

    def round(self, rows: range, left: Any, codes: Any, out: Any) -> tuple[int, float]:
        """Round some rows.

        Args:
            rows: which rows of the weight.
            left: their part of the left factor, as `bands` yields it.
            codes: the old codes of these rows, (rows, in), contiguous.
            out: the new ones.

        Returns:
            how many codes stand for another number than before, and the sum of the update's
            magnitudes, each in units of its grid.
        """
        update: tuple[Any, ...]
        if self._is_fused:
            update = (left.astype(self._dtype), self._right)
        else:
            update = (self._product(left).reshape(codes.shape),)
        changed, size = self._kernel(*update, self._factor, codes, rows.start, *self._grid, out)
        return int(changed), float(size)

    def round_bytes(
        self, rows: range, left: Any, stream: Any, out: Any, codes: Any
    ) -> tuple[int, float]:
        """Round some rows in the bytes that hold two codes each.

        Args:
            rows: which rows of the weight.
            left: their part of the left factor, as `bands` yields it.
            stream: their bytes, uint8 (rows, in / 2), contiguous.
            out: the new bytes.
            codes: becomes what the new bytes decode to, uint8 (rows, in), as `Matrix.codes`.

        Returns:
            as `round`.
        """
        if self._is_fused:
            left, right = left.astype(self._dtype), self._right
        else:
            left = self._product(left)
            right = np.empty((0, self._shape[1]), left.dtype)
        changed, size = self._kernel(
            left, right, self._factor, stream, rows.start, *self._grid, out, codes
        )
        return int(changed), float(size)

    def _product(self, left: Any) -> Any:
        return np.ascontiguousarray(self._multiply(left))


def fits_bytes(grid: Matrix, offset: int | None) -> bool:
    """Return whether rows of a weight can be merged in their bytes: both codes share a step.

    Args:
        grid: the weight; its codes do not matter.
        offset: what is added to a code for the nibble that is stored; None if no nibble is.
    """
    kind = (grid.kind.bits, offset) in ((4, 8), (4, 0)) and grid.kind.is_float == (offset == 0)
    return kind and grid.order is None and grid.block[1] % 2 == 0


def regridded(delta: Delta, target: Target, base: Matrix) -> Regridded:
    """Add a target's update to a quantised weight, and round to the base's grid.

    Args:
        delta: bound to the quantised base, of an exact method.
        target: one of its targets.
        base: the weight.

    Raises:
        CheckpointError: a step is none that a layout can store.
    """
    regridder, out = Regridder(delta, target, base), np.empty_like(base.codes)
    changed, size = 0, 0.0
    for rows, left in regridder.bands():
        part = slice(rows.start, rows.stop)
        codes = np.ascontiguousarray(base.codes[part])
        count, sum_ = regridder.round(rows, left, codes, out[part])
        changed, size = changed + count, size + sum_ * 2.0**base.kind.unit
    return Regridded(
        matrix=replace(base, codes=out), changed=changed, steps=size, still=base.still_weights
    )
