"""Real inputs at given shapes: rows are cut, repeated and padded, never invented."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kilodelta.verify.runners.runner import Arrays, Batch

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

MASK = "attention_mask"
_SIZES = ("smallest", "usual", "largest")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs at one point of a profile; `shape` is that of the first input, for reports."""

    name: str
    batch: Batch

    @property
    def shape(self) -> tuple[int, ...]:
        return next(iter(self.batch.values())).shape


def cases(batch: Batch, profile: Mapping[str, Sequence[tuple[int, ...]]]) -> tuple[Case, ...]:
    """The batch at a profile's smallest, usual and largest shapes, equal shapes only once.

    The usual case keeps padding, as long as rows leave room for it; in the others every position
    holds a real token, so that the last position of the largest shape is computed for real.
    """
    chosen: dict[tuple[tuple[int, ...], ...], Case] = {}
    for index, name in enumerate(_SIZES):
        shapes = {key: tuple(points[index]) for key, points in profile.items()}
        case = Case(name=name, batch=fit(batch, shapes, padded=name == "usual"))
        chosen.setdefault(tuple(shapes.values()), case)
    return tuple(chosen.values())


def fit(batch: Batch, shapes: Shapes, *, padded: bool) -> Arrays:
    """Bring every input named in `shapes` to its shape, by rows and along the sequence."""
    arrays = {name: batch[name] for name in shapes}
    if MASK not in arrays:
        return {name: _wrap(array, shapes[name]) for name, array in arrays.items()}
    rows, length = shapes[MASK]
    mask = _wrap(arrays[MASK], (rows, arrays[MASK].shape[1])).astype(bool)
    columns = np.stack([_columns(row, length) for row in mask])
    fitted = {
        name: _along(array, columns) if _is_sequence(array, arrays[MASK]) else _wrap(array, shape)
        for (name, array), shape in zip(arrays.items(), shapes.values(), strict=True)
    }
    fitted[MASK] = _new_mask(mask, length, padded=padded).astype(batch[MASK].dtype)
    return fitted


def live(output: NDArray[Any], batch: Batch) -> NDArray[Any]:
    """The rows of an output (batch, sequence, ...) whose position is not padding."""
    mask = batch.get(MASK)
    if mask is None or output.ndim < 3 or output.shape[:2] != mask.shape:
        return output
    rows: NDArray[Any] = output[mask.astype(bool)]
    return rows


def _wrap(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Cut or repeat along every axis."""
    for axis, (have, want) in enumerate(zip(array.shape, shape, strict=True)):
        if have != want:
            array = np.take(array, np.arange(want) % have, axis=axis)
    return array


def _columns(mask_row: NDArray[np.bool_], length: int) -> NDArray[np.intp]:
    """For each new position of a row the position of a real token, over and over again."""
    tokens = np.flatnonzero(mask_row if mask_row.any() else ~mask_row)
    return tokens[np.arange(length) % len(tokens)]


def _along(array: NDArray[Any], columns: NDArray[np.intp]) -> NDArray[Any]:
    rows = _wrap(array, (len(columns), array.shape[1]))
    return np.take_along_axis(rows, columns, axis=1)


def _is_sequence(array: NDArray[Any], mask: NDArray[Any]) -> bool:
    return array.ndim == 2 and array.shape == mask.shape


def _new_mask(mask: NDArray[np.bool_], length: int, *, padded: bool) -> NDArray[np.bool_]:
    tokens = mask.sum(axis=1, keepdims=True) if padded else length
    return np.broadcast_to(np.arange(length) < tokens, (len(mask), length))
