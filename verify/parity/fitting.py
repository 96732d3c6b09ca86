"""Bring real inputs to given shapes: cut, repeated, shuffled and padded, never invented.

Texts are rarely as long as the largest shape. Repeating them in order would let every average over
positions add the same few values in the same order, whose roundings add up instead of cancelling.
So a row keeps its own tokens first; then come real tokens of all rows, in a seeded shuffle.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kilodelta.verify.runners.runner import Arrays, Batch

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
Padding: TypeAlias = Literal["none", "right", "left", "own"]

MASK = "attention_mask"
"""The input (rows, tokens) that is 1 where a token counts and 0 at padding."""

_SEED = 0


def fit(batch: Batch, shapes: Shapes, *, padding: Padding) -> Arrays:
    """Return every input named in `shapes`, brought to its shape.

    Args:
        batch: real inputs by name; rows are repeated where more are wanted.
        shapes: the wanted shape of each input, rows first.
        padding: which positions the mask leaves out. With "none" every position holds a token that
            counts. Otherwise rows are padded as far as they are short, and at least one row is;
            padded positions hold other tokens, so that a model which ignores the mask is off. "own"
            keeps every row as it is: only rows are repeated, and other axes stay.

    Example:
        >>> ids = np.array([[5, 6, 7, 0], [8, 9, 0, 0]])
        >>> shapes = {"input_ids": (2, 3), "attention_mask": (2, 3)}
        >>> found = fit({"input_ids": ids, MASK: (ids > 0) * 1}, shapes, padding="left")
        >>> found["attention_mask"].tolist()
        [[1, 1, 1], [0, 1, 1]]
    """
    if padding == "own":
        return {
            name: batch[name][np.arange(shape[0]) % len(batch[name])]
            for name, shape in shapes.items()
        }
    arrays = {name: batch[name] for name in shapes}
    if MASK not in arrays:
        return {name: _resized(array, shapes[name]) for name, array in arrays.items()}
    rows, length = shapes[MASK]
    real = arrays[MASK].astype(bool)
    mask = _mask(real[np.arange(rows) % len(real)].sum(axis=1), length, padding)
    picks = _picks(real, mask)
    fitted: Arrays = {}
    for name, array in arrays.items():
        if name == MASK:
            fitted[name] = mask.astype(array.dtype)
        elif not _along(array, real, shapes[name], (rows, length)):
            fitted[name] = _resized(array, shapes[name])
        elif "position" in name:
            fitted[name] = _positions(array, mask)
        else:
            fitted[name] = array[picks]
    return fitted


def _mask(tokens: NDArray[Any], length: int, padding: Padding) -> NDArray[np.bool_]:
    """Make the new mask, bool (rows, length), of rows that have so many real tokens."""
    if padding == "none":
        return np.ones((len(tokens), length), dtype=bool)
    counts = np.minimum(tokens, length)
    if length > 1 and (counts == length).all():
        counts[-1] = length // 2
    places = np.arange(length)
    last = length - counts[:, None]
    mask: NDArray[np.bool_] = places >= last if padding == "left" else places < counts[:, None]
    return mask


def _picks(
    real: NDArray[np.bool_], mask: NDArray[np.bool_]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Choose for each new position the row and column of a real token, each (rows, length).

    A row's own tokens fill the positions that count, in order; the shuffle fills the others.
    """
    rows, length = mask.shape
    pool = np.argwhere(real if real.any() else ~real)
    rng = np.random.default_rng(_SEED)
    picks = np.empty((rows, length, 2), dtype=np.intp)
    for row in range(rows):
        source = row % len(real)
        own = np.flatnonzero(real[source])
        # First the positions that count, then the padded ones, wherever they lie.
        places = np.argsort(~mask[row], kind="stable")
        kept = places[: min(len(own), int(mask[row].sum()) or length)]
        picks[row, kept] = [(source, column) for column in own[: len(kept)]] or np.empty((0, 2))
        rest = places[len(kept) :]
        picks[row, rest] = pool[_shuffled(len(pool), len(rest), rng)]
    return picks[..., 0], picks[..., 1]


def _shuffled(have: int, want: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Draw `want` indices below `have`: every one before any comes again, in random order."""
    rounds = [rng.permutation(have) for _ in range(-(-want // have))]
    return np.concatenate(rounds)[:want] if rounds else np.empty(0, np.intp)


def _along(
    array: NDArray[Any], real: NDArray[Any], wanted: tuple[int, ...], new: tuple[int, int]
) -> bool:
    """Return whether an input has one entry per token: ids, positions, boxes, embeddings."""
    return array.shape[:2] == real.shape and wanted == (*new, *array.shape[2:])


def _positions(array: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[Any]:
    """Number the tokens that count, from the smallest given position on."""
    first = array.min() if array.size else 0
    positions: NDArray[Any] = np.maximum(mask.cumsum(axis=1) - 1, 0) + first
    return positions.astype(array.dtype)


def _resized(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Cut or extend every axis: rows repeat, integers follow a shuffle, floats are mirrored."""
    for axis, (have, want) in enumerate(zip(array.shape, shape, strict=True)):
        if have != want:
            array = np.take(array, _indices(have, want, axis, array.dtype.kind), axis=axis)
    return array


def _indices(have: int, want: int, axis: int, kind: str) -> NDArray[np.intp]:
    if axis == 0:
        return np.arange(want) % have
    if kind == "f":  # frames or pixels: to and fro, without a jump
        turn = np.arange(want) % (2 * have)
        return np.minimum(turn, 2 * have - 1 - turn)
    # The seed is always the same, so that ids and the inputs beside them stay together.
    more = _shuffled(have, max(want - have, 0), np.random.default_rng(_SEED))
    return np.concatenate([np.arange(have), more])[:want]
