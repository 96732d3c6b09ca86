"""Merge one target into the grid of a quantised base: its codes in, new codes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kilodelta.exact import fused, in_grid, nearest, products
from kilodelta.format.delta import Delta
from kilodelta.format.targets import Target
from kilodelta.grid.matrix import Matrix
from kilodelta.grid.steps import step_parts, table_of
from kilodelta.merging import cpu

BAND = 1 << 20
"""Elements whose update is in memory at a time."""
MIN_CHANGED = 0.01
"""The share of codes below which a merge in the grid has changed almost nothing."""


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


def regridded(delta: Delta, target: Target, base: Matrix) -> Regridded:
    """Add a target's update to a quantised weight, and round to the base's grid.

    Args:
        delta: bound to the quantised base, of an exact method.
        target: one of its targets.
        base: the weight.

    Raises:
        CheckpointError: a step is none that a layout can store.
    """
    c, e = delta.scale(target.name)
    bound = delta.bound(target.name)
    left, right = cpu.stored_factors(delta, target)
    add = _adder(right, bound, np.float64(c))
    rows, columns = base.shape
    out = np.empty_like(base.codes)
    e = e if bound else 0  # an update of zero may have any exponent
    changed, size = 0, 0.0
    step = min(rows, max(1, BAND // columns))
    for span, factors in cpu.bands(left, rows, step, right.shape[0]):
        part = slice(span.start, span.stop)
        count, sum_ = add(factors, base, part, e, out[part])
        changed, size = changed + count, size + sum_
    still = int(base.spread(base.steps == 0).sum()) if base.still else 0
    return Regridded(matrix=replace(base, codes=out), changed=changed, steps=size, still=still)


Add = Callable[[Any, Matrix, slice, int, Any], tuple[int, float]]
"""From (left rows, base, which rows, e, out) to what the kernels return; fills `out`."""


def _adder(right: Any, bound: int, factor: np.float64) -> Add:
    """Return the fastest way to multiply with the right factor and round to the grid."""
    if right.shape[0] > fused.FEW:
        multiply = products.multiplier(right, bound)
        return lambda left, base, rows, e, out: _round(
            (multiply(left).reshape(out.shape),), base, rows, factor, e, out, nearest.ROUND
        )
    floats = np.ascontiguousarray(right, dtype=np.float64)
    return lambda left, base, rows, e, out: _round(
        (left.astype(np.float64), floats), base, rows, factor, e, out, in_grid.MERGE
    )


def _round(
    update: tuple[Any, ...],
    base: Matrix,
    rows: slice,
    factor: np.float64,
    e: int,
    out: Any,
    kernels: tuple[Any, Any],
) -> tuple[int, float]:
    """Round some rows.

    Args:
        update: the integers of the update, or the two factors of them.
        base: the weight.
        rows: which of its rows.
        factor: C, float64.
        e: the exponent of the update's unit.
        out: the new codes of these rows.
        kernels: for integers and for small floats; they say what is returned.
    """
    codes, kind = np.ascontiguousarray(base.codes[rows]), base.kind
    parts = step_parts(base, e, rows)
    integers, floats = kernels
    if kind.is_float:
        table, middles = table_of(kind)
        sign = np.uint8(1 << (kind.bits - 1))
        found = floats(*update, factor, codes, table, middles, parts, sign, out)
    else:
        zeros = np.zeros(parts.signs.shape, np.int64)
        if base.zeros is not None:
            zeros = base.zeros[np.arange(base.shape[0])[rows] // base.block[0]].astype(np.int64)
        low, high = np.float64(kind.low), np.float64(kind.high)
        width = 0 if base.order is not None else base.block[1]
        found = integers(*update, factor, codes, zeros, parts, width, low, high, out)
    changed, size = found
    return int(changed), float(size) * 2.0**kind.unit
